//! Refuses to start where swap is on and the configuration does not want it: what a pod may use of memory could not be
//! held to then.

/// Swap is on although `failSwapOn` is true.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "swap is on ({devices}) and failSwapOn is true: turn it off with `swapoff -a` (and in /etc/fstab, so that it stays \
     off), or set failSwapOn: false to run with it"
)]
pub struct SwapOn {
    devices: String,
}

/// `swaps` is the text of `/proc/swaps`, empty where the kernel has no swap at all.
pub fn refuse_swap(fail_swap_on: bool, swaps: &str) -> Result<(), SwapOn> {
    let devices: Vec<&str> =
        swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    if !fail_swap_on || devices.is_empty() {
        return Ok(());
    }
    Err(SwapOn { devices: devices.join(", ") })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";

    #[test]
    fn swap_that_is_on_is_refused_by_name_unless_it_is_wanted() {
        let on = format!("{HEADER}/dev/sda2 partition 1 0 -2\n/swapfile file 1 0 -3\n");
        let error = refuse_swap(true, &on).unwrap_err().to_string();
        assert!(error.contains("/dev/sda2, /swapfile") && error.contains("swapoff -a"), "{error}");
        assert_eq!(refuse_swap(false, &on), Ok(()));
        assert_eq!(refuse_swap(true, HEADER), Ok(()));
        assert_eq!(refuse_swap(true, ""), Ok(()));
    }
}
