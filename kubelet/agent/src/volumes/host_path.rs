//! Paths of the host: what a pod expects to find there, checked or made.

use crate::volumes::error::VolumeCause;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HostPathCheck {
    Nothing,
    DirectoryOrCreate,
    Directory,
    FileOrCreate,
    File,
    Socket,
    CharDevice,
    BlockDevice,
}

impl HostPathCheck {
    pub(super) fn parse(kind: &str) -> Result<Self, VolumeCause> {
        Ok(match kind {
            "" => Self::Nothing,
            "DirectoryOrCreate" => Self::DirectoryOrCreate,
            "Directory" => Self::Directory,
            "FileOrCreate" => Self::FileOrCreate,
            "File" => Self::File,
            "Socket" => Self::Socket,
            "CharDevice" => Self::CharDevice,
            "BlockDevice" => Self::BlockDevice,
            other => return Err(VolumeCause::HostPathKind { kind: other.to_owned() }),
        })
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Nothing => "anything",
            Self::DirectoryOrCreate | Self::Directory => "a directory",
            Self::FileOrCreate | Self::File => "a file",
            Self::Socket => "a socket file",
            Self::CharDevice => "a character device",
            Self::BlockDevice => "a block device",
        }
    }
}

/// Makes the path if it is to be made, then checks that it is of the kind that is wanted. Links are followed: they are
/// the host's own.
pub(super) fn check(path: &Path, wanted: HostPathCheck) -> Result<(), VolumeCause> {
    if wanted == HostPathCheck::Nothing {
        return Ok(());
    }
    let missing = match std::fs::metadata(path) {
        Ok(_) => false,
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(error) => return Err(VolumeCause::file("look at", path)(error)),
    };
    if missing && wanted == HostPathCheck::DirectoryOrCreate {
        let mut builder = std::fs::DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o755)
            .create(path)
            .map_err(VolumeCause::file("create directory", path))?;
    }
    if missing && wanted == HostPathCheck::FileOrCreate {
        let mut options = std::fs::OpenOptions::new();
        options
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .open(path)
            .map_err(VolumeCause::file("create file", path))?;
    }
    let wrong = || VolumeCause::HostPathType { path: path.to_owned(), expected: wanted.expected() };
    let kind = std::fs::metadata(path).map_err(|_| wrong())?.file_type();
    let right = match wanted {
        HostPathCheck::Nothing => true,
        HostPathCheck::DirectoryOrCreate | HostPathCheck::Directory => kind.is_dir(),
        HostPathCheck::FileOrCreate | HostPathCheck::File => kind.is_file(),
        HostPathCheck::Socket => kind.is_socket(),
        HostPathCheck::CharDevice => kind.is_char_device(),
        HostPathCheck::BlockDevice => kind.is_block_device(),
    };
    if right { Ok(()) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(path: &Path, kind: &str) -> Result<(), String> {
        check(path, HostPathCheck::parse(kind).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn each_type_is_checked_or_made() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        assert!(outcome(&at("none"), "").is_ok());
        for (name, kind) in [
            ("file", "File"),
            ("file", "FileOrCreate"),
            ("new-file", "FileOrCreate"),
            ("new/dir", "DirectoryOrCreate"),
            ("new/dir", "Directory"),
            ("socket", "Socket"),
        ] {
            assert_eq!(outcome(&at(name), kind), Ok(()), "{name} {kind}");
        }
        assert!(outcome(Path::new("/dev/null"), "CharDevice").is_ok());
        let missing = format!("hostPath type check failed: {} is not a directory", at("none").display());
        assert_eq!(outcome(&at("none"), "Directory"), Err(missing));
        for (name, kind) in [
            ("file", "Directory"),
            ("file", "DirectoryOrCreate"),
            ("new", "File"),
            ("file", "Socket"),
            ("file", "CharDevice"),
            ("file", "BlockDevice"),
            ("none", "File"),
        ] {
            assert!(outcome(&at(name), kind).is_err(), "{name} {kind}");
        }
        assert!(HostPathCheck::parse("Dir").is_err());
    }
}
