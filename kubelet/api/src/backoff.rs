//! How long to wait before the next try.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(30);

/// Doubling delays with jitter: quick at first, so a server that was only restarted is found within a second, and never
/// longer than half a minute.
#[derive(Debug, Clone, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The delay before the next try. `chance` in 0..1 spreads the clients of a server that comes back.
    pub fn next(&mut self, chance: f64) -> Duration {
        let delay = FIRST.saturating_mul(1 << self.failures.min(16)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        delay.mul_f64(0.75 + 0.25 * chance.clamp(0.0, 1.0))
    }

    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// A random number in 0..1.
#[must_use]
pub fn chance() -> f64 {
    let mut bytes = [0u8; 4];
    // Without randomness there is no jitter, which is no reason to stop.
    if aws_lc_rs::rand::fill(&mut bytes).is_err() {
        return 0.5;
    }
    f64::from(u32::from_le_bytes(bytes)) / (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_from_a_tenth_of_a_second_to_half_a_minute() {
        let mut backoff = Backoff::default();
        let delays: Vec<_> = (0..12).map(|_| backoff.next(1.0).as_millis()).collect();
        assert_eq!(delays[..5], [100, 200, 400, 800, 1600]);
        assert_eq!(delays[11], 30_000);
        backoff.reset();
        assert_eq!(backoff.next(0.0), Duration::from_millis(75));
    }

    #[test]
    fn four_tries_fit_into_the_first_second_and_a_half() {
        let mut backoff = Backoff::default();
        let total: Duration = (0..4).map(|_| backoff.next(1.0)).sum();
        assert!(total <= Duration::from_millis(1500), "{total:?}");
    }

    #[test]
    fn chance_lies_between_zero_and_one() {
        assert!((0..100).map(|_| chance()).all(|c| (0.0..1.0).contains(&c)));
    }
}
