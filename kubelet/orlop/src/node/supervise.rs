//! Keeps a part of the node going: a failure is told, and the part started again after a while.

use orlop_kubelet::shutdown::Shutdown;
use std::fmt::Display;
use std::future::Future;
use std::time::Duration;

const FIRST_DELAY: Duration = Duration::from_secs(1);
const LONGEST_DELAY: Duration = Duration::from_secs(30);

/// Runs `start` again and again until the node stops.
pub(super) async fn supervise<E: Display, F: Future<Output = Result<(), E>>>(
    part: &'static str,
    shutdown: Shutdown,
    start: impl Fn() -> F,
) {
    let mut delay = FIRST_DELAY;
    while let Some(ended) = shutdown.unless_triggered(start()).await {
        match ended {
            Ok(()) => return,
            Err(error) => {
                tracing::error!(part, %error, retry_s = delay.as_secs(), "a part of the node failed, starting it again")
            }
        }
        if shutdown.unless_triggered(tokio::time::sleep(delay)).await.is_none() {
            return;
        }
        delay = (delay * 2).min(LONGEST_DELAY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test(start_paused = true)]
    async fn a_part_that_fails_is_started_again_and_one_that_ends_is_not() {
        let starts = AtomicU32::new(0);
        supervise("test", Shutdown::new(), || async {
            if starts.fetch_add(1, Ordering::SeqCst) < 3 { Err("broken") } else { Ok(()) }
        })
        .await;
        assert_eq!(starts.load(Ordering::SeqCst), 4);
    }

    #[tokio::test]
    async fn the_end_of_the_node_ends_it() {
        let shutdown = Shutdown::new();
        shutdown.trigger();
        supervise("test", shutdown, std::future::pending::<Result<(), &str>>).await;
    }
}
