//! The log that runc's callers read: one line per message, as text or as JSON objects with level, msg and time.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write;
use std::sync::Mutex;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

#[derive(Debug)]
pub(super) struct Log {
    /// Standard error without one.
    file: Option<Mutex<File>>,
    json: bool,
    debug: bool,
}

impl Log {
    pub(super) fn new(file: Option<File>, json: bool, debug: bool) -> Self {
        Self { file: file.map(Mutex::new), json, debug }
    }

    pub(super) fn write(&self, level: &str, message: &str) {
        let time = jiff::Timestamp::now();
        let line = if self.json {
            serde_json::json!({"level": level, "msg": message, "time": time.to_string()}).to_string()
        } else {
            format!("time=\"{time}\" level={level} msg={message:?}")
        };
        let line = format!("{line}\n");
        // A log that cannot be written is no reason to fail.
        let _ = match &self.file {
            Some(file) => file.lock().map(|mut file| file.write_all(line.as_bytes())).unwrap_or(Ok(())),
            None => std::io::stderr().write_all(line.as_bytes()),
        };
    }
}

#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a string cannot fail.
        let _ = if field.name() == "message" {
            let rest = std::mem::take(&mut self.0);
            write!(self.0, "{value:?}{rest}")
        } else {
            write!(self.0, " {}={value:?}", field.name())
        };
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.debug || *metadata.level() <= Level::INFO
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG | Level::TRACE => "debug",
        };
        self.write(level, &text.0);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}
