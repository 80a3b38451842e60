//! Timings: collected by step, summed up as percentiles.

use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// How long each step took, every time it was taken.
#[derive(Debug, Default, Clone)]
pub struct Timings(BTreeMap<String, Vec<Duration>>);

impl Timings {
    pub fn add(&mut self, step: &str, took: Duration) {
        self.0.entry(step.to_owned()).or_default().push(took);
    }

    pub fn merge(&mut self, other: Self) {
        for (step, took) in other.0 {
            self.0.entry(step).or_default().extend(took);
        }
    }

    /// Milliseconds that this share of the samples stayed within; none where there are no samples.
    #[must_use]
    pub fn quantile(&self, step: &str, percent: usize) -> Option<f64> {
        let mut sorted = self.0.get(step).filter(|samples| !samples.is_empty())?.clone();
        sorted.sort();
        Some(millis(sorted[(sorted.len() - 1) * percent.min(100) / 100]))
    }

    #[must_use]
    pub fn summary(&self) -> Value {
        let mut steps = Map::new();
        for (step, samples) in &self.0 {
            let [p50, p99, max] = [50, 99, 100].map(|percent| self.quantile(step, percent));
            steps.insert(
                step.clone(),
                json!({"p50_ms": p50, "p99_ms": p99, "max_ms": max, "samples": samples.len()}),
            );
        }
        Value::Object(steps)
    }
}

/// Milliseconds with microseconds behind the point.
#[must_use]
pub fn millis(took: Duration) -> f64 {
    rounded(took.as_secs_f64() * 1000.0)
}

/// Three digits behind the point are more than any figure here deserves.
#[must_use]
pub fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_sorted_samples() {
        let mut timings = Timings::default();
        for n in [5, 1, 3, 2, 4] {
            timings.add("step", Duration::from_millis(n));
        }
        assert_eq!(timings.quantile("step", 50), Some(3.0));
        assert_eq!(timings.quantile("step", 100), Some(5.0));
        assert_eq!(timings.quantile("other", 50), None);
    }
}
