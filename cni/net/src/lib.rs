//! The netlink and nftables layer that pod network, overlay and proxy share.
//!
//! [`nft`] is a ruleset as values and one transaction per change; [`rtnl`] has the verbs for links, addresses, routes
//! and neighbours; [`netns`] does work in another network namespace; [`sysctl`] sets kernel switches and unsets them.

pub mod netns;
pub mod nft;
pub mod rtnl;
pub mod sysctl;
