//! The option words of a mount.

use crate::syscall::attr;

/// Attribute bits to set and to clear, in the terms of `mount_setattr`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) set: u64,
    pub(crate) clear: u64,
}

impl Attributes {
    pub(crate) fn is_empty(self) -> bool {
        self.set == 0 && self.clear == 0
    }

    fn set(&mut self, bits: u64) {
        self.set |= bits;
        self.clear &= !bits;
    }

    fn unset(&mut self, bits: u64) {
        self.set &= !bits;
        self.clear |= bits;
    }

    /// The access time mode is a field, not a flag: replacing it means clearing all of it.
    fn atime(&mut self, mode: u64) {
        self.set = self.set & !attr::ATIME | mode;
        self.clear |= attr::ATIME;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Propagation {
    pub(crate) kind: u64,
    pub(crate) recursive: bool,
}

/// Option words, sorted by what they act on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// `Some(true)` for `rbind`.
    pub(crate) bind: Option<bool>,
    pub(crate) remount: bool,
    pub(crate) attributes: Attributes,
    /// Applied to the whole tree below the mount.
    pub(crate) recursive: Attributes,
    pub(crate) propagation: Vec<Propagation>,
    /// `Some(true)` for `ridmap`.
    pub(crate) idmap: Option<bool>,
    pub(crate) copy_up: bool,
    /// Everything else, for the file system itself.
    pub(crate) data: Vec<String>,
}

pub(crate) fn parse<S: AsRef<str>>(words: &[S]) -> Options {
    let mut options = Options::default();
    for word in words {
        let word = word.as_ref();
        if !structural(&mut options, word)
            && !attribute(&mut options.attributes, word)
            && !word.strip_prefix('r').is_some_and(|word| recursive(&mut options.recursive, word))
            && !ignored(word)
        {
            options.data.push(word.to_owned());
        }
    }
    options
}

fn structural(options: &mut Options, word: &str) -> bool {
    let propagation = |kind: libc::c_ulong, recursive| Propagation { kind, recursive };
    match word {
        "bind" => options.bind = Some(options.bind.unwrap_or(false)),
        "rbind" => options.bind = Some(true),
        "remount" => options.remount = true,
        "idmap" => options.idmap = Some(false),
        "ridmap" => options.idmap = Some(true),
        "tmpcopyup" => options.copy_up = true,
        "private" => options.propagation.push(propagation(libc::MS_PRIVATE, false)),
        "rprivate" => options.propagation.push(propagation(libc::MS_PRIVATE, true)),
        "shared" => options.propagation.push(propagation(libc::MS_SHARED, false)),
        "rshared" => options.propagation.push(propagation(libc::MS_SHARED, true)),
        "slave" => options.propagation.push(propagation(libc::MS_SLAVE, false)),
        "rslave" => options.propagation.push(propagation(libc::MS_SLAVE, true)),
        "unbindable" => options.propagation.push(propagation(libc::MS_UNBINDABLE, false)),
        "runbindable" => options.propagation.push(propagation(libc::MS_UNBINDABLE, true)),
        _ => return false,
    }
    true
}

fn attribute(bits: &mut Attributes, word: &str) -> bool {
    match word {
        "ro" => bits.set(attr::RDONLY),
        "rw" => bits.unset(attr::RDONLY),
        "nosuid" => bits.set(attr::NOSUID),
        "suid" => bits.unset(attr::NOSUID),
        "nodev" => bits.set(attr::NODEV),
        "dev" => bits.unset(attr::NODEV),
        "noexec" => bits.set(attr::NOEXEC),
        "exec" => bits.unset(attr::NOEXEC),
        "nodiratime" => bits.set(attr::NODIRATIME),
        "diratime" => bits.unset(attr::NODIRATIME),
        "nosymfollow" => bits.set(attr::NOSYMFOLLOW),
        "symfollow" => bits.unset(attr::NOSYMFOLLOW),
        "noatime" => bits.atime(attr::NOATIME),
        "strictatime" => bits.atime(attr::STRICTATIME),
        // relatime is the kernel's own default, which the negations lead back to.
        "relatime" | "atime" | "nostrictatime" => bits.atime(0),
        _ => return false,
    }
    true
}

fn recursive(bits: &mut Attributes, word: &str) -> bool {
    // `rnorelatime` is a word of the specification that changes nothing, like `norelatime`.
    word == "norelatime" || attribute(bits, word)
}

/// Words without effect: defaults, and flags of a superblock that is not ours to change.
fn ignored(word: &str) -> bool {
    matches!(word, "defaults" | "norelatime" | "loud" | "silent" | "iversion" | "noiversion" | "nofail")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_a_kubernetes_volume_are_understood() {
        let options = parse(&["rbind", "rprivate", "ro", "nosuid"]);
        assert_eq!(options.bind, Some(true));
        assert_eq!(options.attributes.set, attr::RDONLY | attr::NOSUID);
        assert_eq!(options.propagation, [Propagation { kind: libc::MS_PRIVATE, recursive: true }]);
        assert!(options.data.is_empty());
    }

    #[test]
    fn a_later_word_overrides_an_earlier_one() {
        let options = parse(&["ro", "rw", "noatime", "strictatime"]);
        assert_eq!(options.attributes.set, attr::STRICTATIME);
        assert_eq!(options.attributes.clear, attr::RDONLY | attr::ATIME);
    }

    #[test]
    fn recursive_words_act_on_the_tree_and_not_on_similar_plain_ones() {
        let options = parse(&["rro", "rnosuid", "relatime", "ro"]);
        assert_eq!(options.recursive.set, attr::RDONLY | attr::NOSUID);
        assert_eq!(options.attributes, Attributes { set: attr::RDONLY, clear: attr::ATIME });
    }

    #[test]
    fn unknown_words_are_the_file_systems() {
        assert_eq!(
            parse(&["mode=755", "size=64k", "sync", "defaults"]).data,
            ["mode=755", "size=64k", "sync"]
        );
    }
}
