//! Architectures of system calls and their numbers.

use oci_spec::runtime::Arch;

/// One numbering of system calls as the kernel tells it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Abi {
    X86_64,
    X86,
    /// x86-64 numbers with [`X32_BIT`] set.
    X32,
    Aarch64,
    Arm,
}

pub(super) const X32_BIT: u32 = 0x4000_0000;

impl Abi {
    pub(super) fn native() -> Option<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Some(Self::X86_64),
            "aarch64" => Some(Self::Aarch64),
            _ => None,
        }
    }

    /// `None` for one that never occurs on the machines we know.
    pub(super) fn of(arch: Arch) -> Option<Self> {
        match arch {
            Arch::ScmpArchNative => Self::native(),
            Arch::ScmpArchX86_64 => Some(Self::X86_64),
            Arch::ScmpArchX86 => Some(Self::X86),
            Arch::ScmpArchX32 => Some(Self::X32),
            Arch::ScmpArchAarch64 => Some(Self::Aarch64),
            Arch::ScmpArchArm => Some(Self::Arm),
            _ => None,
        }
    }

    /// `AUDIT_ARCH_*`, what `seccomp_data.arch` holds.
    pub(super) fn audit(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => 0xc000_003e,
            Self::X86 => 0x4000_0003,
            Self::Aarch64 => 0xc000_00b7,
            Self::Arm => 0x4000_0028,
        }
    }

    /// The number of a system call, or `None` if this architecture has none of that name.
    pub(super) fn number(self, name: &str) -> Option<u32> {
        let id = match self {
            Self::X86_64 => name.parse::<syscalls::x86_64::Sysno>().ok()?.id(),
            Self::X86 => name.parse::<syscalls::x86::Sysno>().ok()?.id(),
            Self::Aarch64 => name.parse::<syscalls::aarch64::Sysno>().ok()?.id(),
            Self::Arm => name.parse::<syscalls::arm::Sysno>().ok()?.id(),
            Self::X32 => {
                let special = X32_SPECIAL.iter().position(|special| *special == name);
                return match special {
                    Some(index) => u32::try_from(index).ok().map(|index| (512 + index) | X32_BIT),
                    None => Self::X86_64.number(name).map(|number| number | X32_BIT),
                };
            }
        };
        u32::try_from(id).ok()
    }
}

/// The calls that have numbers of their own under x32, from 512 on.
const X32_SPECIAL: &[&str] = &[
    "rt_sigaction",
    "rt_sigreturn",
    "ioctl",
    "readv",
    "writev",
    "recvfrom",
    "sendmsg",
    "recvmsg",
    "execve",
    "ptrace",
    "rt_sigpending",
    "rt_sigtimedwait",
    "rt_sigqueueinfo",
    "sigaltstack",
    "timer_create",
    "mq_notify",
    "kexec_load",
    "waitid",
    "set_robust_list",
    "get_robust_list",
    "vmsplice",
    "move_pages",
    "preadv",
    "pwritev",
    "rt_tgsigqueueinfo",
    "recvmmsg",
    "sendmmsg",
    "process_vm_readv",
    "process_vm_writev",
    "setsockopt",
    "getsockopt",
    "io_setup",
    "io_submit",
    "execveat",
    "preadv2",
    "pwritev2",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel() {
        assert_eq!(Abi::X86_64.number("execve"), Some(59));
        assert_eq!(Abi::X86.number("execve"), Some(11));
        assert_eq!(Abi::Aarch64.number("execve"), Some(221));
        assert_eq!(Abi::X32.number("execve"), Some(520 | X32_BIT));
        assert_eq!(Abi::X32.number("pwritev2"), Some(547 | X32_BIT));
        assert_eq!(Abi::X32.number("getpid"), Some(39 | X32_BIT));
        assert_eq!(Abi::X86_64.number("no_such_call"), None);
    }
}
