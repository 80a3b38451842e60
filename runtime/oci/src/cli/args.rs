//! Command line parsing: long options with one or two dashes, `--name value` and `--name=value`, ended by the first
//! word that is none (as runc's callers expect).

use std::collections::HashMap;

/// An option: its names, the first of them canonical, and whether it takes a value.
#[derive(Debug, Clone, Copy)]
pub(super) struct Opt(pub(super) &'static [&'static str], pub(super) bool);

#[derive(Debug, Default)]
pub(super) struct Parsed {
    values: HashMap<&'static str, Vec<String>>,
    pub(super) rest: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("flag provided but not defined: {0}")]
    Unknown(String),
    #[error("flag needs an argument: {0}")]
    NoValue(String),
    #[error("flag {0}: {1:?} is not a boolean")]
    NotBool(String, String),
    #[error("flag {0}: {1:?} is not a number")]
    NotNumber(&'static str, String),
}

impl Parsed {
    pub(super) fn parse(args: &[String], options: &[Opt]) -> Result<Self, Error> {
        let mut parsed = Self::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let Some(name) =
                arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')).filter(|n| !n.is_empty())
            else {
                if arg == "--" {
                    parsed.rest.extend(args.cloned());
                } else {
                    parsed.rest.push(arg.clone());
                    parsed.rest.extend(args.cloned());
                }
                break;
            };
            let (name, inline) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name, None),
            };
            let Some(Opt(names, takes_value)) = options.iter().find(|opt| opt.0.contains(&name)) else {
                return Err(Error::Unknown(arg.clone()));
            };
            let value = match (takes_value, inline) {
                (true, Some(value)) => value,
                (true, None) => args.next().cloned().ok_or_else(|| Error::NoValue(arg.clone()))?,
                (false, None) => "true".to_owned(),
                (false, Some(value)) if matches!(value.as_str(), "true" | "false" | "1" | "0") => value,
                (false, Some(value)) => return Err(Error::NotBool(name.to_owned(), value)),
            };
            if let Some(canonical) = names.first() {
                parsed.values.entry(canonical).or_default().push(value);
            }
        }
        Ok(parsed)
    }

    /// The last value given.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name)?.last().map(String::as_str)
    }

    pub(super) fn all(&self, name: &str) -> &[String] {
        self.values.get(name).map(Vec::as_slice).unwrap_or_default()
    }

    pub(super) fn is_set(&self, name: &str) -> bool {
        matches!(self.get(name), Some("true" | "1"))
    }

    pub(super) fn number<T: std::str::FromStr>(&self, name: &'static str) -> Result<Option<T>, Error> {
        self.get(name)
            .map(|text| text.parse().map_err(|_| Error::NotNumber(name, text.to_owned())))
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: &[Opt] = &[Opt(&["bundle", "b"], true), Opt(&["no-pivot"], false)];

    fn parse(line: &str) -> Result<Parsed, Error> {
        Parsed::parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>(), OPTIONS)
    }

    #[test]
    fn options_end_at_the_first_other_word() {
        let parsed = parse("-b /x --no-pivot id --bundle y").unwrap();
        assert_eq!(parsed.get("bundle"), Some("/x"));
        assert!(parsed.is_set("no-pivot"));
        assert_eq!(parsed.rest, ["id", "--bundle", "y"]);
        assert_eq!(parse("-bundle=/y z").unwrap().get("bundle"), Some("/y"));
    }

    #[test]
    fn mistakes_are_named() {
        assert!(matches!(parse("--nope x"), Err(Error::Unknown(_))));
        assert!(matches!(parse("--bundle"), Err(Error::NoValue(_))));
        assert!(matches!(parse("--no-pivot=maybe"), Err(Error::NotBool(..))));
    }
}
