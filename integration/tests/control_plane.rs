//! The lab itself: the pinned control plane comes up, and nothing is left of it afterwards.

use anyhow::Result;
use orlop_integration::lab::Lab;
use std::path::Path;

#[test]
fn the_pinned_control_plane_answers_and_leaves_nothing_behind() -> Result<()> {
    let id = format!("cp{}", std::process::id());
    let mut lab = Lab::create(&id)?;
    lab.start_control_plane()?;
    let version = lab.kubectl()?.run(&["version", "--output=json"])?;
    assert!(version.contains("v1.36.3"), "{version}");
    let folder = lab.folder().to_owned();
    let hub = lab.hub().path();
    drop(lab);
    assert!(!folder.exists() && !hub.exists());
    assert!(!Path::new("/sys/fs/cgroup/unified").join(format!("orlop-lab-{id}")).exists());
    Ok(())
}
