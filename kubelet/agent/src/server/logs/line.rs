//! One line of the CRI's log format, `TIME STREAM TAG TEXT`, turned into what the client asked for.

use super::LogOptions;
use bytes::{Bytes, BytesMut};
use jiff::Timestamp;

/// Turns raw lines into output, keeping what must be known from line to line.
#[derive(Debug)]
pub(super) struct Shaper {
    timestamps: bool,
    since: Option<Timestamp>,
    left: Option<u64>,
    /// The last piece was not the end of its line: its text goes on without a new time.
    unfinished: bool,
}

impl Shaper {
    pub(super) fn new(options: &LogOptions) -> Self {
        Self {
            timestamps: options.timestamps,
            since: options.since,
            left: options.limit_bytes,
            unfinished: false,
        }
    }

    /// As many bytes as asked for have gone out.
    pub(super) fn is_full(&self) -> bool {
        self.left == Some(0)
    }

    /// Shapes whole raw lines, each with its newline.
    pub(super) fn shape(&mut self, lines: &[u8]) -> Bytes {
        let mut output = BytesMut::with_capacity(lines.len());
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            self.shape_line(line, &mut output);
        }
        if let Some(left) = &mut self.left {
            output.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= output.len() as u64;
        }
        output.freeze()
    }

    fn shape_line(&mut self, line: &[u8], output: &mut BytesMut) {
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let (Some(time), Some(_stream), Some(tag), Some(text)) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            // Not our format: a file somebody else wrote. Showing nothing of it would hide it.
            return output.extend_from_slice(line);
        };
        if self.is_too_old(time) {
            return;
        }
        if self.timestamps && !self.unfinished {
            output.extend_from_slice(time);
            output.extend_from_slice(b" ");
        }
        // Several tags may stand there, separated by colons; the first tells whether the line goes on.
        self.unfinished = tag.first() == Some(&b'P');
        let text = if self.unfinished { text.strip_suffix(b"\n").unwrap_or(text) } else { text };
        output.extend_from_slice(text);
    }

    fn is_too_old(&self, time: &[u8]) -> bool {
        let Some(since) = self.since else { return false };
        let time = std::str::from_utf8(time).ok().and_then(|text| text.parse::<Timestamp>().ok());
        time.is_some_and(|time| time < since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &[u8] = b"2026-01-01T00:00:01Z stdout F one\n2026-01-01T00:00:02Z stderr P tw\n\
        2026-01-01T00:00:02Z stderr F o\n2026-01-01T00:00:03Z stdout F \n";

    fn shaped(options: &LogOptions) -> String {
        String::from_utf8(Shaper::new(options).shape(LOG).to_vec()).unwrap()
    }

    #[test]
    fn pieces_are_joined_and_empty_lines_stay() {
        assert_eq!(shaped(&LogOptions::default()), "one\ntwo\n\n");
    }

    #[test]
    fn a_time_stands_once_before_each_line() {
        let options = LogOptions { timestamps: true, ..LogOptions::default() };
        let expected = "2026-01-01T00:00:01Z one\n2026-01-01T00:00:02Z two\n2026-01-01T00:00:03Z \n";
        assert_eq!(shaped(&options), expected);
    }

    #[test]
    fn older_lines_are_left_out_and_the_limit_is_exact() {
        let since = Some("2026-01-01T00:00:02Z".parse().unwrap());
        assert_eq!(shaped(&LogOptions { since, ..LogOptions::default() }), "two\n\n");
        let mut shaper = Shaper::new(&LogOptions { limit_bytes: Some(5), ..LogOptions::default() });
        assert_eq!(&shaper.shape(LOG)[..], b"one\nt");
        assert!(shaper.is_full());
    }
}
