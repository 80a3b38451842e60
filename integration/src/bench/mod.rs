//! Benchmarks: orlop beside the programs it replaces, on one machine in one run. Figures leave as one JSON document,
//! and are worth comparing only as ratios within it.

pub mod cri;
pub mod cri_suite;
pub mod figures;
pub mod machine;
pub mod node_suite;
pub mod oci;
pub mod processes;
pub mod ready;
pub mod runtimes;
pub mod stock;
pub mod tunables;
pub mod verdict;

use std::time::Duration;

/// How much is measured.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Short series per runtime, taken in turns.
    pub rounds: usize,
    /// Pods of a short series, one by one.
    pub pods: usize,
    pub execs: usize,
    /// Pods of the burst.
    pub burst: usize,
    /// Runs of each OCI runtime.
    pub runs: usize,
    /// Pods applied one after the other on the real control plane.
    pub applies: usize,
    /// Sizes of deployments; the last one is also observed at rest.
    pub replicas: Vec<usize>,
    /// Pods with an exec probe each second.
    pub probed: usize,
    /// How long processors are watched.
    pub rest: Duration,
}

impl Settings {
    #[must_use]
    pub fn full() -> Self {
        Self {
            rounds: 2,
            pods: 20,
            execs: 20,
            burst: 110,
            runs: 50,
            applies: 10,
            replicas: vec![50, 100],
            probed: 100,
            rest: Duration::from_secs(20),
        }
    }

    /// Enough to see that everything works; no figure to quote.
    #[must_use]
    pub fn quick() -> Self {
        Self {
            rounds: 1,
            pods: 3,
            execs: 3,
            burst: 10,
            runs: 5,
            applies: 2,
            replicas: vec![5],
            probed: 5,
            rest: Duration::from_secs(3),
        }
    }
}
