//! The word to stop, passed to every task of the kubelet.

use std::future::Future;
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

/// Clones share one word. A task that is told to stop finishes what must not be left half done, and returns.
#[derive(Debug, Clone, Default)]
pub struct Shutdown(CancellationToken);

impl Shutdown {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Tells everybody to stop.
    pub fn trigger(&self) {
        self.0.cancel();
    }

    #[must_use]
    pub fn is_triggered(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Ready when it is time to stop.
    pub fn triggered(&self) -> WaitForCancellationFuture<'_> {
        self.0.cancelled()
    }

    /// The token below, for libraries that take one.
    #[must_use]
    pub fn token(&self) -> CancellationToken {
        self.0.clone()
    }

    /// The work's result, or none if it was time to stop first.
    pub async fn unless_triggered<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        self.0.run_until_cancelled(work).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_clone_hears_the_word() {
        let shutdown = Shutdown::new();
        let clone = shutdown.clone();
        assert_eq!(clone.unless_triggered(async { 1 }).await, Some(1));
        shutdown.trigger();
        assert!(clone.is_triggered());
        assert_eq!(clone.unless_triggered(std::future::pending::<()>()).await, None);
    }
}
