//! The requests of the control API and their answers.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State as Extract;
use axum::http::{StatusCode, header};
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post, put};
use axum::{Json, Router};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinError;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};

use super::errors::{all_json, failure};
use super::managers::{self, ManagedCommand, ManagedError};
use super::migrations::{CallOff, Resolve};
use super::owners::{self, AdminCommand, AdminError};
use super::snapshots::SnapshotAnswer;
use super::states::{States, Told, listen};
use super::{Device, Failure, Info, OPENAPI, Shutdown, Status, UnderWay};
use crate::config::object;
use crate::config::offer;
use crate::errors::chain;
use crate::exit::Outcome;
use crate::machine::lease::Purpose;
use crate::machine::{self, Machine, TransitionError};
use crate::migrate::source::{self as migrate, MigrateError};
use crate::snapshot::report::Request;
use crate::snapshot::save::save;

/// What a request can reach.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) machine: Arc<Machine>,
    pub(super) states: Arc<States>,
    /// Administration commands, which may wait for a member, that have a thread. Others wait for one of these.
    pub(super) admin: Arc<Semaphore>,
}

/// Every path of the API, and the methods it takes. The OpenAPI document is held against this list.
pub const PATHS: [(&str, &[&str]); 12] = [
    ("/api/v1/info", &["get"]),
    ("/api/v1/admin", &["post"]),
    ("/api/v1/managed", &["post"]),
    ("/api/v1/pause", &["post", "put"]),
    ("/api/v1/resume", &["post", "put"]),
    ("/api/v1/snapshot", &["post", "put"]),
    ("/api/v1/migrate", &["post", "put"]),
    ("/api/v1/migrate/cancel", &["post", "put"]),
    ("/api/v1/resolve", &["post", "put"]),
    ("/api/v1/shutdown", &["post", "put"]),
    ("/api/v1/events", &["get"]),
    ("/openapi.json", &["get"]),
];

fn handler(path: &str) -> MethodRouter<Context> {
    match path {
        "/api/v1/info" => get(info),
        "/api/v1/admin" => post(admin),
        "/api/v1/managed" => post(managed),
        "/api/v1/pause" => put(pause).post(pause),
        "/api/v1/resume" => put(resume).post(resume),
        "/api/v1/snapshot" => put(snapshot).post(snapshot),
        "/api/v1/migrate" => put(migrate).post(migrate),
        "/api/v1/migrate/cancel" => put(call_off).post(call_off),
        "/api/v1/resolve" => put(resolve).post(resolve),
        "/api/v1/shutdown" => put(shutdown).post(shutdown),
        "/api/v1/events" => get(events),
        "/openapi.json" => get(openapi),
        _ => MethodRouter::new(),
    }
}

pub(super) fn router(context: Context) -> Router {
    let mut router = Router::new();
    for (path, _) in PATHS {
        router = router.route(path, handler(path));
    }
    let router = router
        .fallback(async || {
            failure(
                StatusCode::NOT_FOUND,
                "no such path; GET /openapi.json lists them",
            )
        })
        .method_not_allowed_fallback(async || {
            failure(
                StatusCode::METHOD_NOT_ALLOWED,
                "this path takes another method; GET /openapi.json lists them",
            )
        })
        .with_state(context);
    all_json(router)
}

async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI)
}

async fn info(Extract(context): Extract<Context>) -> Json<Info> {
    Json(describe(&context.machine))
}

/// What there is to say about a machine.
pub fn describe(machine: &Machine) -> Info {
    let config = machine.spec();
    Info {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        state: machine.state().into(),
        cpus: config.cpus,
        memory: config.memory,
        kernel: config.boot.kernel.display().to_string(),
        cmdline: config.boot.cmdline.clone(),
        devices: machine
            .functions()
            .single()
            .iter()
            .map(|function| Device {
                name: function.virtio.name().to_owned(),
                place: function.place.to_string(),
                queues: function.virtio.num_queues(),
                live: function.virtio.is_live(),
                stopped_by: owners::stopped_by(&function.virtio),
                doors: offer::names(function.virtio.doors()),
                packed: function.virtio.offers_packed(),
                uses_packed: function.virtio.is_packed(),
            })
            .collect(),
        owners: owners::describe(machine),
        managers: managers::describe(machine),
        progress: machine.progress(),
        migration: machine.migration.status(),
    }
}

/// Executes a command that may take its time on a thread of its own, as many at once as there are permits.
async fn in_turn<T: Send + 'static>(
    context: Context,
    execute: impl FnOnce(&Machine) -> T + Send + 'static,
) -> Result<T, JoinError> {
    let machine = context.machine;
    // The semaphore is never closed. The permit goes with the thread, also if nobody waits for the answer any more.
    let permit = context.admin.acquire_owned().await;
    let executed = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        execute(&machine)
    });
    executed.await
}

async fn admin(Extract(context): Extract<Context>, body: Bytes) -> Response {
    let command: AdminCommand = match object::parse(&body) {
        Ok(command) => command,
        Err(error) => return failure(StatusCode::BAD_REQUEST, error),
    };
    match in_turn(context, move |machine| owners::execute(machine, &command)).await {
        Ok(Ok(answer)) => Json(answer).into_response(),
        Ok(Err(error @ AdminError::Owner { .. })) => failure(StatusCode::NOT_FOUND, error),
        Ok(Err(error @ AdminError::Data(_))) => failure(StatusCode::BAD_REQUEST, error),
        Ok(Err(error @ AdminError::Busy(_))) => failure(StatusCode::CONFLICT, error),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, error),
    }
}

async fn managed(Extract(context): Extract<Context>, body: Bytes) -> Response {
    let command: ManagedCommand = match object::parse(&body) {
        Ok(command) => command,
        Err(error) => return failure(StatusCode::BAD_REQUEST, error),
    };
    match in_turn(context, move |machine| managers::execute(machine, &command)).await {
        Ok(Ok(answer)) => Json(answer).into_response(),
        Ok(Err(error @ ManagedError::Manager { .. })) => failure(StatusCode::NOT_FOUND, error),
        Ok(Err(error @ (ManagedError::Busy(_) | ManagedError::Waits))) => {
            failure(StatusCode::CONFLICT, error)
        }
        Ok(Err(error)) => failure(StatusCode::BAD_REQUEST, error),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, error),
    }
}

/// Runs what may block for seconds on a thread of its own.
async fn transition(
    context: Context,
    what: fn(&Machine) -> Result<machine::State, TransitionError>,
) -> Response {
    let machine = Arc::clone(&context.machine);
    match tokio::task::spawn_blocking(move || what(&machine)).await {
        Ok(Ok(state)) => {
            let state = state.into();
            Json(Status { state }).into_response()
        }
        Ok(Err(error)) => failure(StatusCode::CONFLICT, error),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, error),
    }
}

async fn pause(Extract(context): Extract<Context>) -> Response {
    transition(context, Machine::pause).await
}

async fn resume(Extract(context): Extract<Context>) -> Response {
    transition(context, Machine::resume).await
}

async fn snapshot(Extract(context): Extract<Context>, body: Bytes) -> Response {
    let request: Request = match object::parse(&body) {
        Ok(request) => request,
        Err(error) => return failure(StatusCode::BAD_REQUEST, error),
    };
    let machine = Arc::clone(&context.machine);
    let mut waiting = Waiting(Some(Arc::clone(&context.machine)));
    let saved = tokio::task::spawn_blocking(move || save(&machine, &request)).await;
    waiting.0 = None;
    let state = context.machine.state().into();
    match saved {
        Ok(Ok(report)) => Json(SnapshotAnswer { state, report }).into_response(),
        Ok(Err(error)) if error.is_conflict() => failure(StatusCode::CONFLICT, chain(&error)),
        Ok(Err(error)) => failure(StatusCode::INTERNAL_SERVER_ERROR, chain(&error)),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, error),
    }
}

async fn migrate(Extract(context): Extract<Context>, body: Bytes) -> Response {
    let request: migrate::Request = match object::parse(&body) {
        Ok(request) => request,
        Err(error) => return failure(StatusCode::BAD_REQUEST, error),
    };
    let (tell, told) = oneshot::channel();
    let machine = Arc::clone(&context.machine);
    let called_off = Arc::new(AtomicBool::new(false));
    let mut waiting = CallingOff(Some(Arc::clone(&called_off)));
    // A thread of its own: it lasts as long as a doubt does.
    let thread = std::thread::Builder::new()
        .name("migrate".to_owned())
        .spawn(move || {
            migrate::run(&machine, &request, &called_off, |answer| {
                // Whoever asked may be gone.
                let _ = tell.send(answer);
            });
        });
    if let Err(error) = thread {
        return failure(StatusCode::INTERNAL_SERVER_ERROR, error);
    }
    let answer = told.await;
    waiting.0 = None;
    match answer {
        Ok(Ok(answer)) => Json(answer).into_response(),
        Ok(Err(
            error @ (MigrateError::Address(_)
            | MigrateError::Number { .. }
            | MigrateError::Security(_)
            | MigrateError::NothingToVerify
            | MigrateError::NothingToCopy),
        )) => failure(StatusCode::BAD_REQUEST, error),
        Ok(Err(error)) => {
            let mut answer = Failure::new(chain(&error));
            if let MigrateError::Kept { attempt, .. } = error {
                answer.attempt = Some(attempt);
            }
            (StatusCode::CONFLICT, Json(answer)).into_response()
        }
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, error),
    }
}

/// Whoever asked for a migration and waits for it; dropped if the connection is closed before the answer.
struct CallingOff(Option<Arc<AtomicBool>>);

impl Drop for CallingOff {
    fn drop(&mut self) {
        if let Some(called_off) = &self.0 {
            called_off.store(true, Ordering::Relaxed);
        }
    }
}

async fn call_off(Extract(context): Extract<Context>) -> Response {
    if context.machine.migration.call_off() {
        return Json(CallOff { called_off: true }).into_response();
    }
    failure(
        StatusCode::CONFLICT,
        "no migration is under way that could be called off",
    )
}

async fn resolve(Extract(context): Extract<Context>, body: Bytes) -> Response {
    let request: Resolve = match object::parse(&body) {
        Ok(request) => request,
        Err(error) => return failure(StatusCode::BAD_REQUEST, error),
    };
    let machine = Arc::clone(&context.machine);
    if !machine.migration.resolve(request.resolution) {
        return failure(StatusCode::CONFLICT, "this guest is not in doubt");
    }
    let settled = tokio::task::spawn_blocking(move || machine.wait_for_leaving()).await;
    if let Err(error) = settled {
        return failure(StatusCode::INTERNAL_SERVER_ERROR, error);
    }
    if let Some(why) = context.machine.migration.take_stuck() {
        return failure(StatusCode::CONFLICT, why);
    }
    let state = context.machine.state().into();
    Json(Status { state }).into_response()
}

/// Whoever asked for a snapshot and waits for it; dropped if the connection is closed before the answer.
struct Waiting(Option<Arc<Machine>>);

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(machine) = &self.0 {
            machine.give_up_snapshot();
        }
    }
}

/// Whether the power button of a guest was pressed.
enum Pressed {
    Yes,
    /// It makes no difference, and why.
    No(String),
}

/// Presses the power button of the guest, if it is here and can see that.
fn press(machine: &Machine) -> std::io::Result<Pressed> {
    const END: &str = "`tern shutdown --force-after 0`";
    let why = match machine.holder() {
        Some(Purpose::Arrival) => format!(
            "the guest is still arriving, and stays at its source until all of it is here; shut it down there, or end this \
             process ({END}): then it stays there"
        ),
        Some(Purpose::Migration) => format!(
            "the guest is being moved to another process; call that off first (`tern migrate --cancel`), wait and shut it \
             down there, or end it as it is ({END})"
        ),
        Some(Purpose::Doubt) => "the guest was given to another process, and nobody knows whether it runs there; end that \
             first (`tern resolve`)"
            .to_owned(),
        _ if machine.press_power_button()? => return Ok(Pressed::Yes),
        _ => match machine.outcome() {
            Some(outcome @ Outcome::Moved(_)) => outcome.to_string(),
            Some(_) => return Ok(Pressed::Yes),
            None => format!(
                "the guest is paused and cannot see its power button; let it run first (`tern resume`), or end it as it is \
                 ({END})"
            ),
        },
    };
    Ok(Pressed::No(why))
}

async fn shutdown(Extract(context): Extract<Context>, body: Bytes) -> Response {
    let request: Shutdown = if body.is_empty() {
        Shutdown::default()
    } else {
        match object::parse(&body) {
            Ok(request) => request,
            Err(error) => return failure(StatusCode::BAD_REQUEST, error),
        }
    };
    let machine = context.machine;
    let force = |machine: &Machine| {
        machine.finish(Outcome::Stopped("a forced shutdown over the control API"));
    };
    match request.force_after_ms {
        Some(0) => force(&machine),
        after => {
            match press(&machine) {
                Ok(Pressed::Yes) => {}
                Ok(Pressed::No(why)) => return failure(StatusCode::CONFLICT, why),
                Err(error) => return failure(StatusCode::INTERNAL_SERVER_ERROR, error),
            }
            if let Some(after) = after {
                let machine = Arc::downgrade(&machine);
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(after)).await;
                    if let Some(machine) = machine.upgrade() {
                        force(&machine);
                    }
                });
            }
        }
    }
    let state = machine.state().into();
    (StatusCode::ACCEPTED, Json(Status { state })).into_response()
}

impl From<Told> for SseEvent {
    fn from(told: Told) -> Self {
        let (name, data) = match told {
            Told::State(event) => ("state", serde_json::to_string(&event)),
            Told::UnderWay(work) => ("progress", serde_json::to_string(&work)),
        };
        Self::default().event(name).data(data.unwrap_or_default())
    }
}

async fn events(
    Extract(context): Extract<Context>,
) -> Sse<impl Stream<Item = Result<SseEvent, Infallible>>> {
    let (tell, told) = mpsc::channel(1);
    let machine = context.machine;
    let work = move || UnderWay {
        progress: machine.progress(),
        migration: machine.migration.status(),
    };
    tokio::spawn(listen(context.states, work, tell));
    let stream = ReceiverStream::new(told).map(|told| Ok(told.into()));
    Sse::new(stream).keep_alive(KeepAlive::default())
}
