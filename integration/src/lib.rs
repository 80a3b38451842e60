//! Tests of orlop against peers that others wrote, the lab and the benchmarks.
