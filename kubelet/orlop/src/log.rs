//! The program's own log: filter, format and where it goes.

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
    Journald,
}

/// The crates a filter may name without their prefix.
const OURS: [&str; 12] = [
    "oci",
    "keeper",
    "image",
    "cri",
    "net",
    "cni",
    "overlay",
    "proxy",
    "api",
    "kubelet",
    "proto",
    "integration",
];

/// Starts logging. `filter` is `LEVEL` and `part=LEVEL` items, such as `debug,kubelet=trace`.
pub fn start(filter: &str, format: LogFormat) -> Result<()> {
    let targets = parse_filter(filter)?;
    let registry = tracing_subscriber::registry();
    match format {
        LogFormat::Text => {
            registry
                .with(fmt::layer().with_writer(std::io::stderr).with_ansi(false).with_filter(targets))
                .init();
        }
        LogFormat::Json => {
            registry.with(fmt::layer().json().with_writer(std::io::stderr).with_filter(targets)).init();
        }
        LogFormat::Journald => {
            let journal =
                tracing_journald::layer().context("log to journald: is systemd-journald running?")?;
            registry.with(journal.with_filter(targets)).init();
        }
    }
    Ok(())
}

fn parse_filter(filter: &str) -> Result<Targets> {
    // Libraries below us are chatty at levels that tell an operator nothing.
    let mut targets = Targets::new().with_default(LevelFilter::WARN);
    let mut ours = LevelFilter::INFO;
    let mut parts = Vec::new();
    for item in filter.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let level = |text: &str| {
            text.parse::<LevelFilter>().with_context(|| {
                format!("log filter {item:?}: {text:?} is none of off, error, warn, info, debug, trace")
            })
        };
        match item.split_once('=') {
            None => ours = level(item)?,
            Some((part, text)) if OURS.contains(&part) => parts.push((format!("orlop_{part}"), level(text)?)),
            Some(("orlop", text)) => parts.push(("orlop".to_owned(), level(text)?)),
            Some((part, text)) if part.contains("::") || part.contains('_') => {
                parts.push((part.to_owned(), level(text)?));
            }
            Some((part, _)) => {
                bail!("log filter {item:?}: no part is called {part:?}; known are {}", OURS.join(", "))
            }
        }
    }
    for part in OURS {
        targets = targets.with_target(format!("orlop_{part}"), ours);
    }
    targets = targets.with_target("orlop", ours);
    Ok(parts.into_iter().fold(targets, |targets, (name, level)| targets.with_target(name, level)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    #[test]
    fn a_bare_level_is_for_our_own_parts_only() -> Result<()> {
        let targets = parse_filter("debug")?;
        assert!(targets.would_enable("orlop_kubelet::pods", &Level::DEBUG));
        assert!(!targets.would_enable("hyper::proto", &Level::DEBUG));
        Ok(())
    }

    #[test]
    fn a_part_can_have_a_level_of_its_own() -> Result<()> {
        let targets = parse_filter("warn,kubelet=trace")?;
        assert!(targets.would_enable("orlop_kubelet", &Level::TRACE));
        assert!(!targets.would_enable("orlop_cri", &Level::INFO));
        Ok(())
    }

    #[test]
    fn a_wrong_filter_says_what_is_wrong() {
        let message = parse_filter("kublet=debug").unwrap_err().to_string();
        assert!(message.contains("kublet") && message.contains("kubelet"), "{message}");
        assert!(parse_filter("loud").unwrap_err().to_string().contains("loud"));
    }
}
