//! Wire types of the interfaces a Kubernetes node speaks. Generated from `wire/*.proto`; no logic lives here.

// Generated code answers to its generator, not to our lints.
#![allow(
    missing_debug_implementations,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::pedantic
)]

/// Container Runtime Interface, version 1, as of cri-api v0.36.
pub mod cri {
    tonic::include_proto!("runtime.v1");
}

/// Container Storage Interface, version 1.
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// Device plugin API, v1beta1.
pub mod deviceplugin {
    tonic::include_proto!("v1beta1");
}

/// Dynamic Resource Allocation, kubelet plugin API, v1.
pub mod dra {
    tonic::include_proto!("k8s.io.kubelet.pkg.apis.dra.v1");
}

/// Kubelet plugin registration, v1.
pub mod pluginregistration {
    tonic::include_proto!("pluginregistration");
}

/// Pod resources API, v1.
pub mod podresources {
    tonic::include_proto!("v1");
}
