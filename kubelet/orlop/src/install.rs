//! `orlop install` and `orlop uninstall`: programs, units and a sample configuration put in place, and taken away.
//!
//! What will be written is a plan first, so that it can be shown, tested and undone by the same list.

use anyhow::{Context, Result, bail};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const PROGRAMS: [&str; 4] = ["orlop", "orlop-keeper", "orlop-oci", "orlop-cni"];
const UNITS: [(&str, &str); 2] = [
    ("orlop-keeper.service", include_str!("../../../systemd/orlop-keeper.service")),
    ("orlop.service", include_str!("../../../systemd/orlop.service")),
];
const SAMPLE: &str = include_str!("../../../systemd/config.yaml");

/// Where things go. `root` is put before every path, for images of other machines.
#[derive(Debug, Clone)]
pub struct Places {
    pub root: PathBuf,
    pub bin: PathBuf,
    pub etc: PathBuf,
    pub units: PathBuf,
}

/// One file that installing writes.
#[derive(Debug, PartialEq, Eq)]
struct File {
    path: PathBuf,
    content: Content,
    mode: u32,
    /// The operator's from the moment it exists: never overwritten, removed only with `--purge`.
    operators: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Content {
    Copy(PathBuf),
    Text(String),
}

fn plan(places: &Places, programs: &Path) -> Vec<File> {
    let below = |path: &Path| places.root.join(path.strip_prefix("/").unwrap_or(path));
    let mut files: Vec<File> = PROGRAMS
        .iter()
        .map(|name| File {
            path: below(&places.bin).join(name),
            content: Content::Copy(programs.join(name)),
            mode: 0o755,
            operators: false,
        })
        .collect();
    for (name, template) in UNITS {
        let text = template
            .replace("@BIN@", &places.bin.display().to_string())
            .replace("@ETC@", &places.etc.display().to_string());
        files.push(File {
            path: below(&places.units).join(name),
            content: Content::Text(text),
            mode: 0o644,
            operators: false,
        });
    }
    files.push(File {
        path: below(&places.etc).join("config.yaml"),
        content: Content::Text(SAMPLE.to_owned()),
        mode: 0o600,
        operators: true,
    });
    files
}

/// Puts everything in place and, on a running systemd, starts it.
pub fn install(places: &Places, start: bool) -> Result<()> {
    let here = std::env::current_exe().context("find this program's own file")?;
    let programs = here.parent().context("this program lies in a folder")?;
    for file in plan(places, programs) {
        if file.operators && file.path.exists() {
            println!("kept      {}", file.path.display());
            continue;
        }
        write(&file)?;
        println!("installed {}", file.path.display());
    }
    if !start {
        println!("start the node with: systemctl enable --now orlop-keeper.service orlop.service");
        return Ok(());
    }
    require_systemd(places)?;
    systemctl(&["daemon-reload"])?;
    systemctl(&["enable", "--now", "orlop-keeper.service", "orlop.service"])?;
    println!("orlop.service runs; `orlop check` looks the node over, `orlop pods` lists what runs on it");
    Ok(())
}

/// Stops the node, takes its containers and files away. `purge` also removes configuration, images and pod data.
pub fn uninstall(places: &Places, purge: bool) -> Result<()> {
    let mut failed = Vec::new();
    let mut attempt = |what: &str, result: Result<()>| {
        if let Err(error) = result {
            failed.push(format!("{what}: {error:#}"));
        }
    };
    let live = places.root == Path::new("/") && Path::new("/run/systemd/system").exists();
    if live && places.units.join("orlop.service").exists() {
        attempt("stop orlop.service", systemctl(&["disable", "--now", "orlop.service"]));
        let orlop = places.bin.join("orlop");
        attempt(
            "purge the node",
            run(Command::new(orlop).args(["purge", "--config"]).arg(places.etc.join("config.yaml"))),
        );
        attempt("stop orlop-keeper.service", systemctl(&["disable", "--now", "orlop-keeper.service"]));
    }
    for file in plan(places, Path::new("/")) {
        if file.operators && !purge {
            println!("kept    {} (--purge removes it)", file.path.display());
        } else if file.path.exists() {
            attempt(
                "remove",
                std::fs::remove_file(&file.path).with_context(|| file.path.display().to_string()),
            );
            println!("removed {}", file.path.display());
        }
    }
    if live {
        attempt("systemctl daemon-reload", systemctl(&["daemon-reload"]));
    }
    if !failed.is_empty() {
        bail!("not everything could be taken away:\n  {}", failed.join("\n  "));
    }
    Ok(())
}

/// Writes under a temporary name and renames, so that a running program's file is replaced and never changed.
fn write(file: &File) -> Result<()> {
    let folder = file.path.parent().context("an installed file lies in a folder")?;
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let temporary =
        folder.join(format!(".{}.new", file.path.file_name().unwrap_or_default().to_string_lossy()));
    match &file.content {
        Content::Copy(from) => {
            std::fs::copy(from, &temporary).with_context(|| {
                format!("copy {}: build all programs with `cargo build --release` first", from.display())
            })?;
        }
        Content::Text(text) => {
            std::fs::write(&temporary, text).with_context(|| format!("write {}", temporary.display()))?;
        }
    }
    std::fs::set_permissions(&temporary, Permissions::from_mode(file.mode))?;
    std::fs::rename(&temporary, &file.path).with_context(|| format!("put {} in place", file.path.display()))
}

fn require_systemd(places: &Places) -> Result<()> {
    if places.root != Path::new("/") || !Path::new("/run/systemd/system").exists() {
        bail!(
            "--start needs the running systemd of this machine; without it, run `orlop-keeper` and `orlop node` yourself"
        );
    }
    Ok(())
}

fn systemctl(arguments: &[&str]) -> Result<()> {
    run(Command::new("systemctl").args(arguments))
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("run {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(root: &Path) -> Places {
        Places {
            root: root.to_owned(),
            bin: "/usr/local/bin".into(),
            etc: "/etc/orlop".into(),
            units: "/etc/systemd/system".into(),
        }
    }

    #[test]
    fn the_plan_fills_the_units_in_and_leaves_no_placeholder() {
        for file in plan(&places(Path::new("/")), Path::new("/build")) {
            if let Content::Text(text) = &file.content {
                assert!(!text.contains("@BIN@") && !text.contains("@ETC@"), "{}", file.path.display());
            }
        }
    }

    #[test]
    fn an_existing_configuration_is_kept_and_purge_removes_it() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let places = places(folder.path());
        let config = folder.path().join("etc/orlop/config.yaml");
        for file in
            plan(&places, Path::new("/nowhere")).iter().filter(|f| matches!(f.content, Content::Text(_)))
        {
            write(file)?;
        }
        std::fs::write(&config, "nodeName: mine\n")?;
        uninstall(&places, false)?;
        assert_eq!(std::fs::read_to_string(&config)?, "nodeName: mine\n");
        assert!(!folder.path().join("etc/systemd/system/orlop.service").exists());
        uninstall(&places, true)?;
        assert!(!config.exists());
        Ok(())
    }
}
