//! Service proxy: ClusterIP and NodePort over nftables.
