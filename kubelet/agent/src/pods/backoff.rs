//! Back-off that doubles, is counted from the moment something ended, and is forgotten after a quiet time.
//!
//! The first failure costs nothing, the second waits the initial delay from the moment of failure, each further one
//! twice as long up to the limit. A failure that comes later than twice the longest delay (ten minutes by default)
//! after the last attempt starts from the beginning.

use jiff::{SignedDuration, Timestamp};

/// When to try again. `updated` is the moment of the last attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    initial: SignedDuration,
    longest: SignedDuration,
    last: Option<Attempt>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Attempt {
    delay: SignedDuration,
    at: Timestamp,
}

impl Backoff {
    #[must_use]
    pub fn new(initial: SignedDuration, longest: SignedDuration) -> Self {
        Self { initial: initial.min(longest), longest, last: None }
    }

    /// Continues a back-off whose `attempts` happened before this process knew of it, the latest at `at`.
    #[must_use]
    pub fn resumed(mut self, attempts: u32, at: Timestamp) -> Self {
        for _ in 0..attempts.min(16) {
            self.record(at, at);
        }
        self
    }

    /// How long the wait is after a failure at `failed`.
    #[must_use]
    pub fn delay(&self, failed: Timestamp) -> SignedDuration {
        match self.last {
            Some(last) if !self.forgotten(last, failed) => last.delay,
            _ => SignedDuration::ZERO,
        }
    }

    /// When something that failed at `failed` may be tried again, if that is still ahead.
    #[must_use]
    pub fn until(&self, failed: Timestamp, now: Timestamp) -> Option<Timestamp> {
        let until = failed.saturating_add(self.delay(failed)).unwrap_or(failed);
        (until > now).then_some(until)
    }

    /// Notes that after the failure at `failed` a new attempt is made `now`.
    pub fn record(&mut self, failed: Timestamp, now: Timestamp) {
        let delay = match self.last {
            Some(last) if !self.forgotten(last, failed) => (last.delay * 2).min(self.longest),
            _ => self.initial,
        };
        self.last = Some(Attempt { delay, at: now });
    }

    pub fn reset(&mut self) {
        self.last = None;
    }

    fn forgotten(&self, last: Attempt, failed: Timestamp) -> bool {
        failed.duration_since(last.at) > self.longest * 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + second).unwrap()
    }

    fn crash_loop() -> Backoff {
        Backoff::new(SignedDuration::from_secs(10), SignedDuration::from_secs(300))
    }

    #[test]
    fn the_first_failure_is_retried_at_once_and_the_next_wait_doubles_up_to_the_limit() {
        let mut backoff = crash_loop();
        let mut now = 0;
        let mut waits = Vec::new();
        for _ in 0..8 {
            let wait = backoff.delay(at(now)).as_secs();
            waits.push(wait);
            now += wait;
            backoff.record(at(now - wait), at(now));
            now += 1;
        }
        assert_eq!(waits, [0, 10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn a_quiet_time_of_twice_the_limit_forgets_the_past() {
        let mut backoff = crash_loop();
        backoff.record(at(0), at(0));
        backoff.record(at(0), at(0));
        assert_eq!(backoff.delay(at(600)).as_secs(), 20);
        assert_eq!(backoff.delay(at(601)).as_secs(), 0);
    }

    #[test]
    fn the_wait_is_counted_from_the_failure() {
        let mut backoff = crash_loop();
        backoff.record(at(0), at(0));
        assert_eq!(backoff.until(at(5), at(6)), Some(at(15)));
        assert_eq!(backoff.until(at(5), at(15)), None);
    }

    #[test]
    fn a_resumed_back_off_waits_as_long_as_the_one_it_continues() {
        let resumed = crash_loop().resumed(3, at(0));
        assert_eq!(resumed.delay(at(1)).as_secs(), 40);
    }
}
