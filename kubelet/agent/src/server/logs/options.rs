//! The query of `/containerLogs`, as `v1.PodLogOptions` travels in one.

use jiff::{SignedDuration, Timestamp};

/// What part of a log is wanted, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::server) struct LogOptions {
    pub follow: bool,
    pub previous: bool,
    pub timestamps: bool,
    pub since: Option<Timestamp>,
    pub tail_lines: Option<u64>,
    pub limit_bytes: Option<u64>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::server) enum OptionsError {
    /// 400
    #[error("unable to decode the query: {key}={value}: {problem}")]
    Query { key: String, value: String, problem: &'static str },
    /// 422
    #[error("{key}: invalid value: {value}: {problem}")]
    Invalid { key: &'static str, value: String, problem: &'static str },
}

impl LogOptions {
    /// Reads the pairs of a query, already decoded.
    pub(in crate::server) fn parse<'a>(
        pairs: impl Iterator<Item = (&'a str, &'a str)>,
        now: Timestamp,
    ) -> Result<Self, OptionsError> {
        let mut options = Self::default();
        let mut since_seconds = None;
        for (key, value) in pairs {
            match key {
                "follow" => options.follow = boolean(key, value)?,
                "previous" => options.previous = boolean(key, value)?,
                "timestamps" => options.timestamps = boolean(key, value)?,
                "sinceSeconds" => since_seconds = Some(positive("sinceSeconds", key, value)?),
                "sinceTime" => {
                    let time = value.parse().map_err(|_| query(key, value, "not an RFC 3339 time"))?;
                    options.since = Some(time);
                }
                // The old spelling: all, or a number of lines.
                "tail" if value == "all" => {}
                "tailLines" | "tail" => options.tail_lines = Some(at_least_zero("tailLines", key, value)?),
                "limitBytes" => options.limit_bytes = Some(positive("limitBytes", key, value)?),
                "stream" if !value.is_empty() && value != "All" => {
                    return Err(query(key, value, "single streams cannot be told apart here"));
                }
                // What a newer client may add is not for us.
                _ => {}
            }
        }
        if let Some(seconds) = since_seconds {
            if options.since.is_some() {
                return Err(OptionsError::Invalid {
                    key: "sinceSeconds",
                    value: seconds.to_string(),
                    problem: "at most one of `sinceTime` or `sinceSeconds` may be specified",
                });
            }
            let ago = SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX));
            options.since = Some(now.checked_sub(ago).unwrap_or(Timestamp::MIN));
        }
        Ok(options)
    }
}

fn query(key: &str, value: &str, problem: &'static str) -> OptionsError {
    OptionsError::Query { key: key.to_owned(), value: value.to_owned(), problem }
}

fn boolean(key: &str, value: &str) -> Result<bool, OptionsError> {
    match value {
        "1" | "t" | "true" | "True" | "TRUE" => Ok(true),
        "" | "0" | "f" | "false" | "False" | "FALSE" => Ok(false),
        _ => Err(query(key, value, "neither true nor false")),
    }
}

fn at_least_zero(name: &'static str, key: &str, value: &str) -> Result<u64, OptionsError> {
    let number: i64 = value.parse().map_err(|_| query(key, value, "not a number"))?;
    u64::try_from(number).map_err(|_| OptionsError::Invalid {
        key: name,
        value: value.to_owned(),
        problem: "must be greater than or equal to 0",
    })
}

fn positive(name: &'static str, key: &str, value: &str) -> Result<u64, OptionsError> {
    match at_least_zero(name, key, value)? {
        0 => Err(OptionsError::Invalid {
            key: name,
            value: value.to_owned(),
            problem: "must be greater than 0",
        }),
        number => Ok(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &'static str) -> Result<LogOptions, OptionsError> {
        let now = Timestamp::from_second(1000).unwrap();
        LogOptions::parse(text.split('&').filter(|p| !p.is_empty()).filter_map(|p| p.split_once('=')), now)
    }

    #[test]
    fn every_option_is_understood() {
        let options =
            parse("follow=true&previous=1&timestamps=false&tailLines=5&limitBytes=7&sinceSeconds=10")
                .unwrap();
        assert!(options.follow && options.previous && !options.timestamps);
        assert_eq!((options.tail_lines, options.limit_bytes), (Some(5), Some(7)));
        assert_eq!(options.since, Some(Timestamp::from_second(990).unwrap()));
        assert_eq!(parse("tail=all").unwrap(), LogOptions::default());
        assert_eq!(parse("tail=3").unwrap().tail_lines, Some(3));
    }

    #[test]
    fn nonsense_and_impossible_values_are_told_apart() {
        assert!(matches!(parse("follow=maybe"), Err(OptionsError::Query { .. })));
        assert!(matches!(parse("tailLines=x"), Err(OptionsError::Query { .. })));
        assert!(matches!(parse("tailLines=-1"), Err(OptionsError::Invalid { .. })));
        assert!(matches!(parse("limitBytes=0"), Err(OptionsError::Invalid { .. })));
        let both = parse("sinceSeconds=1&sinceTime=2026-01-01T00:00:00Z");
        assert!(matches!(both, Err(OptionsError::Invalid { .. })));
    }
}
