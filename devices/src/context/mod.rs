//! The device context: [`FunctionState`](crate::state::FunctionState) as a sequence of fields, each with a type, a
//! length and a value.
