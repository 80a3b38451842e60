//! Flannel-compatible VXLAN overlay.
