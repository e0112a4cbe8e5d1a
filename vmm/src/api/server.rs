//! The thread that serves the control API. It exists only if a socket was asked for.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{Semaphore, broadcast, oneshot};

use super::errors::Listener;
use super::routes::{self, Context};
use super::socket::Socket;
use super::states::States;
use crate::exit::Outcome;
use crate::machine::Machine;

/// How long the last answers and events may take to leave.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Threads for requests that block.
const THREADS: usize = 4;
/// How many of them can have administration commands, so that a pause does not wait for those.
const ADMIN_THREADS: usize = 2;

/// The running server. Stops, and removes the socket, when dropped.
pub struct Server {
    states: Arc<States>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    _socket: Socket,
}

impl Server {
    /// Serves `machine` at `socket`.
    pub fn start(socket: Socket, machine: Arc<Machine>) -> io::Result<Self> {
        let states = States::of(&machine);
        let (stop, stopped) = oneshot::channel();
        let context = Context {
            machine,
            states: Arc::clone(&states),
            admin: Arc::new(Semaphore::new(ADMIN_THREADS)),
        };
        let listener = socket.listener()?;
        let thread = std::thread::Builder::new()
            .name("api".to_owned())
            .stack_size(512 << 10)
            .spawn(move || {
                if let Err(error) = serve(listener, context, stopped) {
                    tracing::error!(%error, "the control API is not available");
                }
            })?;
        Ok(Self {
            states,
            stop: Some(stop),
            thread: Some(thread),
            _socket: socket,
        })
    }

    /// Tells everyone who listens how the guest ended.
    pub fn announce(&self, outcome: &Outcome) {
        self.states.end(outcome);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(
    listener: std::os::unix::net::UnixListener,
    context: Context,
    stopped: oneshot::Receiver<()>,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(THREADS)
        .thread_stack_size(256 << 10)
        .build()?;
    runtime.block_on(async {
        let listener = Listener(tokio::net::UnixListener::from_std(listener)?);
        let (begin, mut begun) = broadcast::channel::<()>(1);
        let graceful = async move {
            let _ = stopped.await;
            drop(begin);
        };
        let serving =
            axum::serve(listener, routes::router(context)).with_graceful_shutdown(graceful);
        let patience = async move {
            let _ = begun.recv().await;
            tokio::time::sleep(LAST_WORDS).await;
        };
        tokio::select! {
            result = serving.into_future() => result,
            () = patience => Ok(()),
        }
    })?;
    runtime.shutdown_background();
    Ok(())
}
