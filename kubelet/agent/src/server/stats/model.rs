//! The answer of `/stats/summary`: the kubelet's Summary, v1alpha1, by its field names. Absent figures are left out.

use jiff::Timestamp;
use serde::{Serialize, Serializer};

/// A moment in nanoseconds since 1970, written to the second as the API writes times.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Moment(pub(super) i64);

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let time = Timestamp::from_second(self.0.div_euclid(1_000_000_000)).unwrap_or_default();
        serializer.collect_str(&time)
    }
}

/// Structs of the answer. What a struct `may` hold is an option, and left out when there is none.
macro_rules! answer {
    ($(
        struct $name:ident {
            must { $($(#[$must_note:meta])* $must:ident: $must_kind:ty,)* }
            may { $($(#[$may_note:meta])* $may:ident: $may_kind:ty,)* }
        }
    )*) => {
        $(
            #[derive(Debug, Clone, Default, PartialEq, Serialize)]
            #[serde(rename_all = "camelCase")]
            pub(super) struct $name {
                $($(#[$must_note])* pub(super) $must: $must_kind,)*
                $(
                    $(#[$may_note])*
                    #[serde(skip_serializing_if = "Option::is_none")]
                    pub(super) $may: Option<$may_kind>,
                )*
            }
        )*
    };
}

answer! {
    struct Summary {
        must { node: Node, pods: Vec<Pod>, }
        may {}
    }

    struct Node {
        must { node_name: String, start_time: Moment, }
        may {
            system_containers: Vec<Container>,
            cpu: Cpu,
            memory: Memory,
            io: Io,
            network: Network,
            fs: Fs,
            runtime: Runtime,
            rlimit: Rlimit,
            swap: Swap,
        }
    }

    struct Runtime {
        must {}
        may { image_fs: Fs, container_fs: Fs, }
    }

    struct Rlimit {
        must { time: Moment, }
        may { maxpid: u64, curproc: u64, }
    }

    struct Pod {
        must { pod_ref: PodRef, start_time: Moment, containers: Vec<Container>, }
        may {
            cpu: Cpu,
            memory: Memory,
            io: Io,
            network: Network,
            volume: Vec<Volume>,
            #[serde(rename = "ephemeral-storage")]
            ephemeral_storage: Fs,
            #[serde(rename = "process_stats")]
            process_stats: Processes,
            swap: Swap,
        }
    }

    struct PodRef {
        must { name: String, namespace: String, uid: String, }
        may {}
    }

    struct Processes {
        must {}
        may {
            #[serde(rename = "process_count")]
            process_count: u64,
        }
    }

    struct Container {
        must { name: String, start_time: Moment, }
        may { cpu: Cpu, memory: Memory, io: Io, rootfs: Fs, logs: Fs, swap: Swap, }
    }

    struct Cpu {
        must { time: Moment, }
        may { usage_nano_cores: u64, usage_core_nano_seconds: u64, psi: Pressure, }
    }

    struct Memory {
        must { time: Moment, }
        may {
            available_bytes: u64,
            usage_bytes: u64,
            working_set_bytes: u64,
            rss_bytes: u64,
            page_faults: u64,
            major_page_faults: u64,
            psi: Pressure,
        }
    }

    struct Io {
        must { time: Moment, }
        may { psi: Pressure, }
    }

    struct Pressure {
        must { full: PressureLine, some: PressureLine, }
        may {}
    }

    struct PressureLine {
        must {
            /// Nanoseconds.
            total: u64,
            avg10: f64,
            avg60: f64,
            avg300: f64,
        }
        may {}
    }

    struct Swap {
        must { time: Moment, }
        may { swap_available_bytes: u64, swap_usage_bytes: u64, }
    }

    struct Network {
        must {
            time: Moment,
            /// The default one; without one its name is empty.
            #[serde(flatten)]
            default: Interface,
        }
        may { interfaces: Vec<Interface>, }
    }

    struct Interface {
        must { name: String, }
        may { rx_bytes: u64, rx_errors: u64, tx_bytes: u64, tx_errors: u64, }
    }

    struct Volume {
        must {
            #[serde(flatten)]
            fs: Fs,
            name: String,
        }
        may {}
    }

    struct Fs {
        must { time: Moment, }
        may {
            available_bytes: u64,
            capacity_bytes: u64,
            used_bytes: u64,
            inodes_free: u64,
            inodes: u64,
            inodes_used: u64,
        }
    }
}
