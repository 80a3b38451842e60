//! Compiles `wire/*.proto` without protoc: protox parses, tonic-prost-build generates.

use std::error::Error;

const FILES: [&str; 6] = [
    "cri.proto",
    "csi.proto",
    "deviceplugin.proto",
    "dra.proto",
    "pluginregistration.proto",
    "podresources.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=wire");
    let descriptors = protox::compile(FILES, ["wire"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
