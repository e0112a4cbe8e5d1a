//! A request that takes a while: on a terminal, a bar shows how far it is until it is answered.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::de::DeserializeOwned;

use crate::api::Info;
use crate::api::client::{ClientError, request, request_within};

/// How long such a request may take: a day. Its progress shows that it goes on.
const PATIENCE: Duration = Duration::from_secs(24 * 60 * 60);
/// How often progress is shown.
const LOOK: Duration = Duration::from_millis(200);

/// Sends `PUT target` with `body` to the guest at `path`. `show` has the bar say how far it is.
pub fn follow<A: DeserializeOwned + Send>(
    path: &Path,
    target: &str,
    body: &[u8],
    show: impl Fn(&ProgressBar, &Info),
) -> Result<A, ClientError> {
    let ask = || request_within(path, "PUT", target, body, PATIENCE);
    if !std::io::stderr().is_terminal() {
        return ask();
    }
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let template = "{msg} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    std::thread::scope(|scope| {
        let (tell, told) = channel();
        scope.spawn(move || {
            // Nobody listens any more only if this function is over.
            let _ = tell.send(ask());
        });
        loop {
            match told.recv_timeout(LOOK) {
                Ok(answer) => {
                    bar.finish_and_clear();
                    return answer;
                }
                Err(RecvTimeoutError::Timeout) => {
                    if let Ok(info) = request(path, "GET", "/api/v1/info", b"") {
                        show(&bar, &info);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(ClientError::Malformed("no answer"));
                }
            }
        }
    })
}
