//! Fuzz targets for everything that reads outside bytes.
