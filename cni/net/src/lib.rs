//! The netlink and nftables layer that pod network, overlay and proxy share.
