//! Blocking work that may never come back: a mount or a stat on a dead server. It runs on a thread of its own, and whoever
//! waits for it waits only so long. A thread that hangs is left behind with what it holds; no pool runs dry by it.

use std::io;
use std::time::Duration;
use tokio::sync::oneshot;

/// Why a piece of work gave no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WorkError {
    #[error("no answer within {0:?}: a file system below hangs")]
    Deadline(Duration),
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    #[error("the work ended without a result")]
    Lost,
}

impl From<WorkError> for io::Error {
    fn from(error: WorkError) -> Self {
        match error {
            WorkError::Deadline(_) => Self::new(io::ErrorKind::TimedOut, error),
            WorkError::Thread(source) => source,
            WorkError::Lost => Self::other(error),
        }
    }
}

/// Runs `work` and waits for it until the deadline.
pub(crate) async fn run<T: Send + 'static>(
    deadline: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, WorkError> {
    let (sender, receiver) = oneshot::channel();
    let thread = std::thread::Builder::new().name("mounts".to_owned()).stack_size(256 << 10);
    thread
        .spawn(move || {
            // Nobody waits any more if the deadline has passed.
            let _ = sender.send(work());
        })
        .map_err(WorkError::Thread)?;
    match tokio::time::timeout(deadline, receiver).await {
        Ok(result) => result.map_err(|_| WorkError::Lost),
        Err(_) => Err(WorkError::Deadline(deadline)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_hangs_is_left_behind() {
        assert_eq!(run(Duration::from_secs(5), || 7).await.unwrap(), 7);
        let (release, hold) = std::sync::mpsc::channel::<()>();
        let error = run(Duration::from_millis(20), move || hold.recv()).await.unwrap_err();
        assert!(matches!(error, WorkError::Deadline(_)), "{error}");
        drop(release);
    }
}
