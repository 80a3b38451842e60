//! What a series of probe results means.

use k8s_openapi::api::core::v1::Probe;
use std::fmt;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProbeKind {
    Startup,
    Liveness,
    Readiness,
}

impl fmt::Display for ProbeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        })
    }
}

/// What one probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Success,
    /// Good enough, but worth telling.
    Warning {
        message: String,
    },
    Failure {
        message: String,
    },
    /// The probe itself did not work, which says nothing about the container.
    Unknown {
        message: String,
    },
}

/// What follows from crossing a threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    Started,
    Ready,
    NotReady,
    /// The container has to be killed, with this grace if the probe states one of its own.
    Kill {
        grace_seconds: Option<i64>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thresholds {
    pub success: u32,
    pub failure: u32,
}

impl Thresholds {
    #[must_use]
    pub fn of(probe: &Probe) -> Self {
        let count = |value: Option<i32>, default| {
            value.and_then(|value| u32::try_from(value).ok()).filter(|value| *value > 0).unwrap_or(default)
        };
        Self { success: count(probe.success_threshold, 1), failure: count(probe.failure_threshold, 3) }
    }
}

/// One probe's history.
///
/// ```text
///                 success × successThreshold
///   failing  ──────────────────────────────────>  passing
///            <──────────────────────────────────
///                 failure × failureThreshold
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeState {
    kind: ProbeKind,
    thresholds: Thresholds,
    grace_seconds: Option<i64>,
    passing: bool,
    /// The latest finding, and how often in a row.
    last: Option<bool>,
    run: u32,
}

impl ProbeState {
    /// `passing`: readiness begins as not ready, liveness as alive, startup as not started, unless more is known.
    #[must_use]
    pub fn new(kind: ProbeKind, probe: &Probe, passing: bool) -> Self {
        Self {
            kind,
            thresholds: Thresholds::of(probe),
            grace_seconds: probe.termination_grace_period_seconds,
            passing,
            last: None,
            run: 0,
        }
    }

    /// Takes a finding in. After a `Kill` or `Started` no more are expected.
    pub fn record(&mut self, outcome: &Outcome) -> Option<Transition> {
        let passed = match outcome {
            Outcome::Success | Outcome::Warning { .. } => true,
            Outcome::Failure { .. } => false,
            Outcome::Unknown { .. } => return None,
        };
        if self.last == Some(passed) {
            self.run = self.run.saturating_add(1);
        } else {
            self.last = Some(passed);
            self.run = 1;
        }
        let needed = if passed { self.thresholds.success } else { self.thresholds.failure };
        if self.run < needed {
            return None;
        }
        let changed = std::mem::replace(&mut self.passing, passed) != passed;
        match (self.kind, passed) {
            (ProbeKind::Startup | ProbeKind::Liveness, false) => {
                Some(Transition::Kill { grace_seconds: self.grace_seconds })
            }
            (ProbeKind::Startup, true) => Some(Transition::Started),
            (ProbeKind::Liveness, true) => None,
            (ProbeKind::Readiness, true) => changed.then_some(Transition::Ready),
            (ProbeKind::Readiness, false) => changed.then_some(Transition::NotReady),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn outcome(code: char) -> Outcome {
        let message = String::new();
        match code {
            '+' => Outcome::Success,
            'w' => Outcome::Warning { message },
            '-' => Outcome::Failure { message },
            _ => Outcome::Unknown { message },
        }
    }

    fn run(kind: ProbeKind, success: i32, failure: i32, passing: bool, codes: &str) -> String {
        let probe = Probe {
            success_threshold: Some(success),
            failure_threshold: Some(failure),
            termination_grace_period_seconds: Some(7),
            ..Probe::default()
        };
        let mut state = ProbeState::new(kind, &probe, passing);
        codes
            .chars()
            .map(|code| match state.record(&outcome(code)) {
                None => '.',
                Some(Transition::Started) => 'S',
                Some(Transition::Ready) => 'R',
                Some(Transition::NotReady) => 'N',
                Some(Transition::Kill { grace_seconds }) => {
                    assert_eq!(grace_seconds, Some(7));
                    'K'
                }
            })
            .collect()
    }

    #[test]
    fn thresholds_count_findings_in_a_row() {
        use ProbeKind::{Liveness, Readiness, Startup};
        for (kind, success, failure, passing, codes, expected) in [
            (Readiness, 1, 3, false, "-+", ".R"),
            (Readiness, 2, 3, false, "+-++", "...R"),
            (Readiness, 1, 3, true, "--+---", ".....N"),
            (Readiness, 1, 1, true, "-+-+", "NRNR"),
            (Readiness, 1, 2, true, "-?-", "..N"),
            (Readiness, 1, 3, false, "w", "R"),
            (Readiness, 1, 3, false, "---", "..."),
            (Liveness, 1, 3, true, "--+--", "....."),
            (Liveness, 1, 3, true, "+---", "...K"),
            (Liveness, 1, 2, true, "-?-", "..K"),
            (Startup, 1, 3, false, "--+", "..S"),
            (Startup, 1, 3, false, "--?-", "...K"),
        ] {
            assert_eq!(run(kind, success, failure, passing, codes), expected, "{kind} {codes}");
        }
    }

    #[test]
    fn absent_and_senseless_thresholds_are_the_defaults() {
        let thresholds = Thresholds::of(&Probe { failure_threshold: Some(-1), ..Probe::default() });
        assert_eq!(thresholds, Thresholds { success: 1, failure: 3 });
    }

    proptest! {
        #[test]
        fn readiness_alternates(codes in "[-+?]{0,60}", success in 1..4i32, failure in 1..4i32, passing: bool) {
            let told: Vec<char> =
                run(ProbeKind::Readiness, success, failure, passing, &codes).chars().filter(|c| *c != '.').collect();
            let mut expected = if passing { 'N' } else { 'R' };
            for transition in told {
                prop_assert_eq!(transition, expected);
                expected = if expected == 'R' { 'N' } else { 'R' };
            }
        }
    }
}
