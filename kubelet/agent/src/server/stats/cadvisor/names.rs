//! The names of cAdvisor's metrics.

use crate::server::stats::exposition::Metric;

macro_rules! names {
    ($($constant:ident = $kind:ident $name:literal $help:literal)*) => {
        $(pub(super) const $constant: Metric = Metric::$kind($name, $help);)*
    };
}

names! {
    SCRAPE_ERROR = gauge "container_scrape_error" "1 if figures of containers could not be had."
    VERSION = gauge "cadvisor_version_info" "Versions of kernel, system and kubelet, in labels; always 1."
    MACHINE_CORES = gauge "machine_cpu_cores" "Logical processors of the machine."
    MACHINE_MEMORY = gauge "machine_memory_bytes" "Memory of the machine."
    MACHINE_SWAP = gauge "machine_swap_bytes" "Swap of the machine."

    CPU = counter "container_cpu_usage_seconds_total" "Processor time used."
    CPU_USER = counter "container_cpu_user_seconds_total" "Processor time used by programs themselves."
    CPU_SYSTEM = counter "container_cpu_system_seconds_total" "Processor time used by the kernel on their behalf."
    PERIODS = counter "container_cpu_cfs_periods_total" "Periods in which the processor limit was in force."
    THROTTLED_PERIODS = counter "container_cpu_cfs_throttled_periods_total" "Periods in which the limit was reached."
    THROTTLED = counter "container_cpu_cfs_throttled_seconds_total" "Time spent waiting because of the limit."
    CPU_PERIOD = gauge "container_spec_cpu_period" "Microseconds that the processor limit is stated for."
    CPU_QUOTA = gauge "container_spec_cpu_quota" "Microseconds of processor time in each period."
    CPU_SHARES = gauge "container_spec_cpu_shares" "Weight against others."

    MEMORY_USAGE = gauge "container_memory_usage_bytes" "Memory in use, all of it."
    WORKING_SET = gauge "container_memory_working_set_bytes" "Memory in use, without what can be dropped first."
    RSS = gauge "container_memory_rss" "Anonymous memory."
    CACHE = gauge "container_memory_cache" "Memory that holds contents of files."
    MAPPED = gauge "container_memory_mapped_file" "Memory that is mapped from files."
    SWAP = gauge "container_memory_swap" "Swap in use."
    KERNEL = gauge "container_memory_kernel_usage" "Memory that the kernel uses on their behalf."
    PEAK = gauge "container_memory_max_usage_bytes" "The most memory that was ever in use."
    ACTIVE_FILE = gauge "container_memory_total_active_file_bytes" "File memory that was used lately."
    INACTIVE_FILE = gauge "container_memory_total_inactive_file_bytes" "File memory that was not used lately."
    LIMIT_HITS = counter "container_memory_failcnt" "How often the memory limit was reached."
    FAULTS = counter "container_memory_failures_total" "Page faults."
    OOM = counter "container_oom_events_total" "Processes killed for want of memory."
    MEMORY_LIMIT = gauge "container_spec_memory_limit_bytes" "Memory limit."
    SWAP_LIMIT = gauge "container_spec_memory_swap_limit_bytes" "Swap limit."

    PROCESSES = gauge "container_processes" "Processes."
    THREADS = gauge "container_threads" "Threads."
    THREADS_MOST = gauge "container_threads_max" "Threads that there may be."
    LAST_SEEN = gauge "container_last_seen" "When it was looked at, in seconds since 1970."
    STARTED = gauge "container_start_time_seconds" "When it began, in seconds since 1970."
    FS_USAGE = gauge "container_fs_usage_bytes" "Disk space of the writable layer."
    FS_INODES = gauge "container_fs_inodes_used" "Files of the writable layer."
}

macro_rules! directions {
    ($($constant:ident = $direction:literal)*) => {
        $(pub(super) const $constant: [Metric; 4] = [
            Metric::counter(concat!("container_network_", $direction, "_bytes_total"), "Bytes on the network."),
            Metric::counter(concat!("container_network_", $direction, "_packets_total"), "Packets on the network."),
            Metric::counter(concat!("container_network_", $direction, "_errors_total"), "Errors on the network."),
            Metric::counter(
                concat!("container_network_", $direction, "_packets_dropped_total"),
                "Packets that were dropped.",
            ),
        ];)*
    };
}

directions! { RECEIVED = "receive" SENT = "transmit" }

macro_rules! pressures {
    ($($constant:ident = $resource:literal)*) => {
        /// Some waited; all waited.
        $(pub(super) const $constant: [Metric; 2] = [
            Metric::counter(
                concat!("container_pressure_", $resource, "_waiting_seconds_total"),
                "Time in which some tasks waited.",
            ),
            Metric::counter(
                concat!("container_pressure_", $resource, "_stalled_seconds_total"),
                "Time in which all tasks waited.",
            ),
        ];)*
    };
}

pressures! { CPU_PRESSURE = "cpu" MEMORY_PRESSURE = "memory" IO_PRESSURE = "io" }

pub(super) const FS_IO: [Metric; 4] = [
    Metric::counter("container_fs_reads_bytes_total", "Bytes read from a device."),
    Metric::counter("container_fs_writes_bytes_total", "Bytes written to a device."),
    Metric::counter("container_fs_reads_total", "Reads from a device."),
    Metric::counter("container_fs_writes_total", "Writes to a device."),
];
