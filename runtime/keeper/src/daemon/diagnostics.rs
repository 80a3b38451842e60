//! What the keeper has to say, on standard error: a subscriber of a few dozen lines, because the usual one weighs more
//! than the rest of the program. A reader that does not read costs lines, never time.

use super::sys;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fmt::{Debug, Write};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LogFormat {
    Text,
    Json,
}

pub(super) fn install(format: LogFormat) {
    // Fails only if it is done twice, and then one is there.
    let _ = tracing::subscriber::set_global_default(StandardError { format });
}

struct StandardError {
    format: LogFormat,
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(&'static str, String)>,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
        } else {
            self.others.push((field.name(), format!("{value:?}")));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
        } else {
            self.others.push((field.name(), value.to_owned()));
        }
    }
}

impl Subscriber for StandardError {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::INFO
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut line = render(self.format, *event.metadata().level(), &fields);
        line.push('\n');
        // A pipe that is ready takes at least a page without blocking.
        let stderr = rustix::stdio::stderr();
        let mut ready = [PollFd::from_borrowed_fd(stderr, PollFlags::OUT)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        if matches!(poll(&mut ready, Some(&at_once)), Ok(1)) {
            let end = line.len().min(4096);
            let _ = rustix::io::write(stderr, &line.as_bytes()[..end]);
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn render(format: LogFormat, level: Level, fields: &Fields) -> String {
    match format {
        LogFormat::Text => {
            let mut line = format!("{level} {}", fields.message);
            for (name, value) in &fields.others {
                let _ = write!(line, " {name}={value:?}");
            }
            line
        }
        LogFormat::Json => {
            let mut object = serde_json::Map::new();
            let mut put = |name: &str, value: String| object.insert(name.to_owned(), value.into());
            put("time_ns", sys::now().to_string());
            put("level", level.to_string());
            put("message", fields.message.clone());
            for (name, value) in &fields.others {
                put(name, value.clone());
            }
            serde_json::Value::Object(object).to_string()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newline_in_a_value_does_not_break_a_line() {
        let fields = Fields { message: "lost".to_owned(), others: vec![("error", "a\nb".to_owned())] };
        assert_eq!(render(LogFormat::Text, Level::WARN, &fields), r#"WARN lost error="a\nb""#);
        let json: serde_json::Value =
            serde_json::from_str(&render(LogFormat::Json, Level::WARN, &fields)).unwrap();
        assert_eq!(json["error"], "a\nb");
    }
}
