//! CPU rates from two readings: the one of the last question and this one's.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A rate over less than this is noise.
const SHORTEST: i64 = 100_000_000;
const SECOND: u128 = 1_000_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reading {
    at: i64,
    usage: u64,
    rate: Option<u64>,
}

impl Reading {
    fn after(last: Option<Self>, at: i64, usage: u64) -> Self {
        let fresh = Self { at, usage, rate: None };
        let Some(last) = last else { return fresh };
        let elapsed = at.saturating_sub(last.at);
        if elapsed < SHORTEST && usage >= last.usage {
            return last;
        }
        // A counter that has gone back is another container's.
        let Some(spent) = usage.checked_sub(last.usage) else { return fresh };
        let rate = u128::from(spent) * SECOND / u128::from(elapsed.unsigned_abs());
        Self { rate: u64::try_from(rate).ok(), ..fresh }
    }
}

/// The last reading of each thing that was asked about.
#[derive(Debug, Default)]
pub(super) struct Samples(Mutex<BTreeMap<String, Reading>>);

impl Samples {
    /// Begins a round. Whatever is not read in it is forgotten at its end.
    pub(super) fn round(&self) -> Round<'_> {
        Round { last: self.0.lock().unwrap_or_else(PoisonError::into_inner), next: BTreeMap::new() }
    }
}

#[derive(Debug)]
pub(super) struct Round<'a> {
    last: MutexGuard<'a, BTreeMap<String, Reading>>,
    next: BTreeMap<String, Reading>,
}

impl Round<'_> {
    /// The rate in billionths of a processor, once there have been two readings.
    pub(super) fn rate(&mut self, key: &str, at: i64, usage: u64) -> Option<u64> {
        let reading = Reading::after(self.last.get(key).copied(), at, usage);
        self.next.insert(key.to_owned(), reading);
        reading.rate
    }
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        *self.last = std::mem::take(&mut self.next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: i64 = 1_000_000_000;

    #[test]
    fn the_rate_is_that_since_the_last_question() {
        let samples = Samples::default();
        assert_eq!(samples.round().rate("a", 10 * S, 500), None);
        assert_eq!(samples.round().rate("a", 12 * S, 1_000_000_500), Some(500_000_000));
    }

    #[test]
    fn questions_in_quick_succession_get_the_same_rate() {
        let samples = Samples::default();
        samples.round().rate("a", 10 * S, 0);
        assert_eq!(samples.round().rate("a", 11 * S, 7), Some(7));
        assert_eq!(samples.round().rate("a", 11 * S + 5, 9), Some(7));
        assert_eq!(samples.round().rate("a", 12 * S, 15), Some(8));
    }

    #[test]
    fn a_restarted_counter_has_no_rate_and_the_absent_are_forgotten() {
        let samples = Samples::default();
        samples.round().rate("a", 10 * S, 500);
        assert_eq!(samples.round().rate("a", 11 * S, 3), None);
        drop(samples.round());
        assert!(samples.0.lock().unwrap().is_empty());
    }
}
