//! The commands that act on a container that exists.

use super::args::{Opt, Parsed};
use super::{Error, Global, info, spawn, update};
use crate::ContainerId;
use std::io::Write;
use std::time::Duration;

pub(super) fn dispatch(global: &Global, command: &str, args: &[String]) -> Result<u8, Error> {
    if global.systemd_cgroup && matches!(command, "create" | "run") {
        return Err(Error::Unsupported("--systemd-cgroup (the systemd cgroup driver)"));
    }
    match command {
        "create" => spawn::create(global, args),
        "run" => spawn::run(global, args),
        "exec" => spawn::exec(global, args),
        "start" => with(global, args, |container| Ok(container.start()?)),
        "pause" => with(global, args, |container| Ok(container.pause()?)),
        "resume" => with(global, args, |container| Ok(container.resume()?)),
        "state" => state(global, args),
        "kill" => kill(global, args),
        "delete" => delete(global, args),
        "list" => list(global, args),
        "ps" => ps(global, args),
        "update" => update::update(global, args),
        "events" => events(global, args),
        "features" => info::features(),
        "spec" => info::spec(args),
        "checkpoint" => Err(Error::Unsupported("checkpoint")),
        "restore" => Err(Error::Unsupported("restore")),
        "help" => print(super::HELP),
        other => Err(Error::Command(other.to_owned())),
    }
}

/// To standard output, without a panic when the reader has gone.
pub(super) fn print(text: &str) -> Result<u8, Error> {
    std::io::stdout().write_all(text.as_bytes()).map_err(|source| Error::Io("write the output", source))?;
    Ok(0)
}

fn with(
    global: &Global,
    args: &[String],
    act: impl Fn(&crate::Container) -> Result<(), Error>,
) -> Result<u8, Error> {
    let parsed = Parsed::parse(args, &[])?;
    act(&global.container(parsed.rest.first())?)?;
    Ok(0)
}

fn state(global: &Global, args: &[String]) -> Result<u8, Error> {
    let parsed = Parsed::parse(args, &[])?;
    let container = global.container(parsed.rest.first())?;
    let mut document = container.document()?;
    if let Some(fields) = document.as_object_mut() {
        fields.insert("rootfs".to_owned(), serde_json::json!(container.rootfs()));
        fields.insert("created".to_owned(), serde_json::json!(container.created()));
        fields.insert("owner".to_owned(), serde_json::json!(""));
    }
    print(&format!("{document:#}\n"))
}

/// A number, or a name with or without SIG.
fn signal(text: &str) -> Result<i32, Error> {
    let unknown = || Error::Signal(text.to_owned());
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=64).contains(&number) { Ok(number) } else { Err(unknown()) };
    }
    let upper = text.to_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = name.strip_prefix("RTMIN") {
        let offset = offset.strip_prefix('+').unwrap_or(offset);
        let offset: i32 = if offset.is_empty() { 0 } else { offset.parse().map_err(|_| unknown())? };
        return Some(34 + offset).filter(|number| (34..=64).contains(number)).ok_or_else(unknown);
    }
    format!("SIG{name}")
        .parse::<nix::sys::signal::Signal>()
        .map(|signal| signal as i32)
        .map_err(|_| unknown())
}

fn kill(global: &Global, args: &[String]) -> Result<u8, Error> {
    let parsed = Parsed::parse(args, &[Opt(&["all", "a"], false)])?;
    let mut rest = parsed.rest.iter();
    let id = rest.next();
    let signal = signal(rest.next().map_or("TERM", String::as_str))?;
    let container = global.container(id)?;
    if parsed.is_set("all") && signal == libc::SIGKILL {
        container.kill_all()?;
    } else {
        container.kill(signal)?;
    }
    Ok(0)
}

fn delete(global: &Global, args: &[String]) -> Result<u8, Error> {
    let parsed = Parsed::parse(args, &[Opt(&["force", "f"], false)])?;
    let force = parsed.is_set("force");
    match global.container(parsed.rest.first()) {
        Ok(container) => container.delete(force)?,
        Err(Error::Runtime(error)) if force && error.is_not_exist() => {
            // A create that was killed before its first record leaves a directory only.
            let id = global.id(parsed.rest.first())?;
            crate::state::StateDir::of(&global.root, &id).remove().map_err(crate::Error::from)?;
        }
        Err(error) => return Err(error),
    }
    Ok(0)
}

fn list(global: &Global, args: &[String]) -> Result<u8, Error> {
    let parsed = Parsed::parse(args, &[Opt(&["format", "f"], true), Opt(&["quiet", "q"], false)])?;
    let mut containers = Vec::new();
    for entry in std::fs::read_dir(&global.root).into_iter().flatten().flatten() {
        let id = entry.file_name().into_string().ok().and_then(|name| ContainerId::new(name).ok());
        // One bad entry must not hide the others.
        if let Some(container) = id.and_then(|id| crate::Container::load(&global.root, &id).ok()) {
            containers.push(container);
        }
    }
    containers.sort_by(|a, b| a.id().cmp(b.id()));
    let mut text = String::new();
    if parsed.is_set("quiet") {
        containers.iter().for_each(|container| text.push_str(&format!("{}\n", container.id())));
        return print(&text);
    }
    if parsed.get("format") == Some("json") {
        let rows = containers.iter().map(|container| {
            let mut row = container.document()?;
            if let Some(fields) = row.as_object_mut() {
                fields.insert("rootfs".to_owned(), serde_json::json!(container.rootfs()));
                fields.insert("created".to_owned(), serde_json::json!(container.created()));
                fields.insert("owner".to_owned(), serde_json::json!("root"));
            }
            Ok(row)
        });
        let rows = rows.collect::<Result<Vec<_>, crate::Error>>()?;
        return print(&format!("{}\n", serde_json::Value::Array(rows)));
    }
    text.push_str(&format!(
        "{:<24}{:<10}{:<10}{:<40}{:<36}OWNER\n",
        "ID", "PID", "STATUS", "BUNDLE", "CREATED"
    ));
    for container in &containers {
        let status = container.status()?;
        let pid = if status == crate::Status::Stopped { 0 } else { container.pid() };
        let (bundle, created) = (container.bundle().display().to_string(), container.created());
        text.push_str(&format!(
            "{:<24}{pid:<10}{status:<10}{bundle:<40}{created:<36}root\n",
            container.id().as_str()
        ));
    }
    print(&text)
}

fn ps(global: &Global, args: &[String]) -> Result<u8, Error> {
    let parsed = Parsed::parse(args, &[Opt(&["format", "f"], true)])?;
    let mut rest = parsed.rest.iter();
    let container = global.container(rest.next())?;
    let pids = container.cgroup().processes()?;
    if parsed.get("format") == Some("json") {
        return print(&format!("{}\n", serde_json::json!(pids)));
    }
    let mut options: Vec<&str> = rest.map(String::as_str).collect();
    if options.is_empty() {
        options.push("-ef");
    }
    let output = std::process::Command::new("ps")
        .args(&options)
        .output()
        .map_err(|source| Error::Io("run ps", source))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header
        .split_whitespace()
        .position(|name| name == "PID")
        .ok_or(Error::Usage("the output of ps has no PID column"))?;
    let mut found = format!("{header}\n");
    for line in lines {
        let pid = line.split_whitespace().nth(column).and_then(|pid| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| pids.contains(&pid)) {
            found.push_str(&format!("{line}\n"));
        }
    }
    print(&found)
}

fn events(global: &Global, args: &[String]) -> Result<u8, Error> {
    let parsed = Parsed::parse(args, &[Opt(&["interval"], true), Opt(&["stats"], false)])?;
    let container = global.container(parsed.rest.first())?;
    let seconds = parsed.get("interval").map_or("5", |text| text.trim_end_matches('s'));
    let interval = Duration::from_secs_f64(
        seconds
            .parse::<f64>()
            .ok()
            .filter(|s| *s > 0.0)
            .ok_or(Error::Usage("--interval must be greater than 0"))?,
    );
    if container.status()? == crate::Status::Stopped {
        return Err(crate::Error::NotRunning.into());
    }
    if parsed.is_set("stats") {
        return print(&format!("{}\n", info::stats(&container)?));
    }
    let mut kills = container.cgroup().events()?.oom_kill;
    while container.status()? != crate::Status::Stopped {
        let now = container.cgroup().events()?.oom_kill;
        if now > kills {
            kills = now;
            print(&format!("{}\n", serde_json::json!({"type": "oom", "id": container.id().as_str()})))?;
        }
        print(&format!("{}\n", info::stats(&container)?))?;
        std::thread::sleep(interval);
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_numbers_and_two_spellings() {
        for (text, number) in [("9", 9), ("KILL", 9), ("SIGTERM", 15), ("sighup", 1), ("RTMIN+3", 37)] {
            assert_eq!(signal(text).unwrap(), number, "{text}");
        }
        for text in ["0", "65", "NOPE", "RTMIN+99"] {
            assert!(matches!(signal(text), Err(Error::Signal(_))), "{text}");
        }
    }
}
