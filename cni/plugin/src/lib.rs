//! Pod network: bridge, addresses and host ports; library and CNI plugin.
