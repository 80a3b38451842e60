//! The netlink and nftables layer that pod network, overlay and proxy share.

pub mod netns;
pub mod nft;
