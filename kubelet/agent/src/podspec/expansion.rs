//! `$(NAME)` in commands, arguments, values and sub paths. `$$` is a dollar sign; a reference to an unknown name stays
//! as it is written.

use std::collections::BTreeMap;

/// Replaces the references in `text`. `lookup` is asked for each name.
pub fn expand<'a>(text: &str, lookup: impl Fn(&str) -> Option<&'a str>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(dollar) = rest.find('$') {
        out.push_str(&rest[..dollar]);
        let after = &rest[dollar + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match lookup(name) {
                Some(value) => out.push_str(value),
                None => out.push_str(&rest[dollar..dollar + name.len() + 3]),
            }
            rest = tail;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

/// Like [`expand`], but the first unknown name is an error.
pub fn expand_strictly(text: &str, values: &BTreeMap<String, String>) -> Result<String, String> {
    let missing = std::cell::RefCell::new(None);
    let expanded = expand(text, |name| {
        let value = values.get(name).map(String::as_str);
        if value.is_none() {
            missing.borrow_mut().get_or_insert_with(|| name.to_owned());
        }
        value
    });
    missing.into_inner().map_or(Ok(expanded), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn references_escapes_and_broken_forms() {
        let values = BTreeMap::from([("A", "1"), ("B", "$(A)"), ("", "empty")]);
        for (text, expanded) in [
            ("$(A)", "1"),
            ("x$(A)y$(A)", "x1y1"),
            ("$(B)", "$(A)"),
            ("$(C)", "$(C)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$$", "$"),
            ("$", "$"),
            ("$A", "$A"),
            ("$(A", "$(A"),
            ("$()", "empty"),
            ("a$", "a$"),
            ("$(A$(A)", "$(A$(A)"),
            ("täg $(A)", "täg 1"),
        ] {
            assert_eq!(expand(text, |name| values.get(name).copied()), expanded, "{text}");
        }
    }

    #[test]
    fn strict_expansion_names_what_is_missing() {
        let values = BTreeMap::from([("A".to_owned(), "1".to_owned())]);
        assert_eq!(expand_strictly("$(A)/x", &values), Ok("1/x".to_owned()));
        assert_eq!(expand_strictly("$(A)/$(NO)", &values), Err("NO".to_owned()));
    }

    proptest! {
        #[test]
        fn text_without_dollars_is_unchanged(text in "[^$]*") {
            prop_assert_eq!(expand(&text, |_| Some("x")), text);
        }

        #[test]
        fn escaped_text_comes_back(text in ".*") {
            prop_assert_eq!(expand(&text.replace('$', "$$"), |_| Some("x")), text);
        }
    }
}
