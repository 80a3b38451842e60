//! The Prometheus text format, version 0.0.4.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Write};

pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A family's name, type and meaning.
#[derive(Debug, Clone, Copy)]
pub(super) struct Metric {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
}

impl Metric {
    pub(super) const fn counter(name: &'static str, help: &'static str) -> Self {
        Self { name, kind: "counter", help }
    }

    pub(super) const fn gauge(name: &'static str, help: &'static str) -> Self {
        Self { name, kind: "gauge", help }
    }

    pub(super) const fn histogram(name: &'static str, help: &'static str) -> Self {
        Self { name, kind: "histogram", help }
    }
}

pub(super) type Labels<'a> = [(&'a str, &'a str)];

/// Samples, kept together by family as the format demands, whatever the order they come in.
#[derive(Debug, Default)]
pub(super) struct Exposition {
    families: BTreeMap<&'static str, (Metric, String)>,
}

impl Exposition {
    /// Adds a sample; `at` is when it was read, in nanoseconds since 1970.
    pub(super) fn add(&mut self, metric: &Metric, labels: &Labels<'_>, value: f64, at: Option<i64>) {
        self.line(metric, "", labels, value, at);
    }

    /// Adds one series of a histogram. `counts` are the observations up to each bound, each counted once.
    pub(super) fn add_histogram(
        &mut self,
        metric: &Metric,
        labels: &Labels<'_>,
        bounds: &[f64],
        counts: &[u64],
        sum: f64,
    ) {
        let mut total = 0;
        for (index, count) in counts.iter().enumerate() {
            total += count;
            let bound = bounds.get(index).map_or_else(|| "+Inf".to_owned(), ToString::to_string);
            let mut labels = labels.to_vec();
            labels.push(("le", &bound));
            self.line(metric, "_bucket", &labels, number(total), None);
        }
        self.line(metric, "_sum", labels, sum, None);
        self.line(metric, "_count", labels, number(total), None);
    }

    fn line(&mut self, metric: &Metric, suffix: &str, labels: &Labels<'_>, value: f64, at: Option<i64>) {
        let (_, lines) = self.families.entry(metric.name).or_insert_with(|| (*metric, String::new()));
        lines.push_str(metric.name);
        lines.push_str(suffix);
        let mut open = '{';
        for (name, value) in labels {
            lines.push(open);
            lines.push_str(name);
            lines.push_str("=\"");
            escape(value, lines);
            lines.push('"');
            open = ',';
        }
        if !labels.is_empty() {
            lines.push('}');
        }
        // Writing to a string does not fail.
        let _infallible = write!(lines, " {value}");
        if let Some(at) = at {
            let _infallible = write!(lines, " {}", at / 1_000_000);
        }
        lines.push('\n');
    }
}

impl Display for Exposition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, (metric, lines)) in &self.families {
            writeln!(f, "# HELP {name} {}\n# TYPE {name} {}", metric.help, metric.kind)?;
            f.write_str(lines)?;
        }
        Ok(())
    }
}

fn escape(value: &str, into: &mut String) {
    for letter in value.chars() {
        match letter {
            '\\' => into.push_str("\\\\"),
            '"' => into.push_str("\\\""),
            '\n' => into.push_str("\\n"),
            other => into.push(other),
        }
    }
}

/// The format knows floating point numbers only; counters beyond 2^53 lose their last digits, as in every exporter.
#[allow(clippy::cast_precision_loss)]
pub(super) fn number(value: u64) -> f64 {
    value as f64
}

/// Nanoseconds as seconds.
pub(super) fn seconds(nanoseconds: u64) -> f64 {
    number(nanoseconds) / 1e9
}

#[cfg(test)]
pub(super) mod parser {
    //! A reader of the format, strict where scrapers are.

    use std::collections::{BTreeMap, BTreeSet};

    #[derive(Debug, Clone, PartialEq)]
    pub(crate) struct Sample {
        pub(crate) name: String,
        pub(crate) labels: BTreeMap<String, String>,
        pub(crate) value: f64,
        pub(crate) milliseconds: Option<i64>,
    }

    /// All samples; panics, with the line, on what a scraper would refuse.
    pub(crate) fn parse(text: &str) -> Vec<Sample> {
        let (mut samples, mut closed, mut seen) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
        let mut family = (String::new(), String::new());
        assert!(text.is_empty() || text.ends_with('\n'), "the last line does not end");
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect(line);
                assert!(closed.insert(name.to_owned()), "family twice: {line}");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                family = (name.to_owned(), kind.to_owned());
                continue;
            }
            if line.starts_with("# HELP ") {
                continue;
            }
            let sample = sample(line);
            let stem = match family.1.as_str() {
                "histogram" => ["_bucket", "_sum", "_count"]
                    .iter()
                    .find_map(|suffix| sample.name.strip_suffix(suffix))
                    .expect(line),
                _ => &sample.name,
            };
            assert_eq!(stem, family.0, "outside of its family: {line}");
            assert!(seen.insert((sample.name.clone(), sample.labels.clone())), "series twice: {line}");
            samples.push(sample);
        }
        samples
    }

    fn sample(line: &str) -> Sample {
        let end = line.find(['{', ' ']).expect(line);
        let (name, mut rest) = line.split_at(end);
        assert!(is_name(name), "{line}");
        let mut labels = BTreeMap::new();
        if rest.starts_with('{') {
            while !rest.starts_with('}') {
                let (label, after) = rest[1..].split_once("=\"").expect(line);
                assert!(is_name(label) && !label.contains(':'), "{line}");
                let (value, after) = quoted(after, line);
                assert!(labels.insert(label.to_owned(), value).is_none(), "label twice: {line}");
                assert!(after.starts_with([',', '}']), "{line}");
                rest = after;
            }
            rest = &rest[1..];
        }
        let mut words = rest.strip_prefix(' ').expect(line).split(' ');
        let value = words.next().expect(line).parse().expect(line);
        let milliseconds = words.next().map(|word| word.parse().expect(line));
        assert!(words.next().is_none(), "{line}");
        Sample { name: name.to_owned(), labels, value, milliseconds }
    }

    fn is_name(name: &str) -> bool {
        let letter = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':';
        name.starts_with(letter) && name.chars().all(|c| letter(c) || c.is_ascii_digit())
    }

    fn quoted<'a>(text: &'a str, line: &str) -> (String, &'a str) {
        let mut value = String::new();
        let mut letters = text.char_indices();
        while let Some((at, letter)) = letters.next() {
            match letter {
                '"' => return (value, &text[at + 1..]),
                '\\' => value.push(match letters.next().expect(line).1 {
                    'n' => '\n',
                    other @ ('\\' | '"') => other,
                    _ => panic!("unknown escape: {line}"),
                }),
                other => value.push(other),
            }
        }
        panic!("label without end: {line}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: Metric = Metric::gauge("up", "Whether it is.");
    const TOOK: Metric = Metric::histogram("took_seconds", "How long it took.");

    #[test]
    fn families_stay_together_and_labels_come_back_as_they_were() {
        let mut out = Exposition::default();
        let odd = "a \"quoted\\path\"\nand more";
        out.add(&UP, &[("who", odd)], 1.0, Some(1_500_000_000));
        out.add_histogram(&TOOK, &[("who", "x")], &[0.5, 1.0], &[1, 0, 2], 7.25);
        out.add(&UP, &[("who", "y")], 0.5, None);
        let samples = parser::parse(&out.to_string());
        assert_eq!(samples.len(), 7);
        let first = samples.iter().find(|sample| sample.labels.get("who").is_some_and(|who| who == odd));
        assert_eq!(first.unwrap().milliseconds, Some(1500));
        let inf = samples.iter().find(|sample| sample.labels.get("le").is_some_and(|le| le == "+Inf"));
        assert_eq!(inf.unwrap().value.to_string(), "3");
    }

    #[test]
    fn large_counters_are_written_without_an_exponent() {
        let mut out = Exposition::default();
        out.add(&UP, &[], number(1 << 52), None);
        assert!(out.to_string().ends_with("\nup 4503599627370496\n"), "{out}");
    }
}
