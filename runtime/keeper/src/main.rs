//! `orlop-keeper`: see `orlop_keeper::daemon`.

fn main() -> std::process::ExitCode {
    orlop_keeper::daemon::main()
}
