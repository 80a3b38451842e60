//! `prctl` calls with arguments that no crate offers.
#![allow(unsafe_code)]

use std::io;

/// Drops every capability from number `first` on: those of a kernel newer than our list.
pub(crate) fn drop_bounding_from(first: u32) -> io::Result<()> {
    for cap in first..64 {
        // SAFETY: PR_CAPBSET_READ and PR_CAPBSET_DROP take one integer.
        let dropped = unsafe {
            if libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(cap), 0, 0, 0) <= 0 {
                return Ok(());
            }
            libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(cap), 0, 0, 0)
        };
        if dropped < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
