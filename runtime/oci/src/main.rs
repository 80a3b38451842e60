//! orlop-oci: OCI runtime with the command line of runc.

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> =
        std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect();
    if args.iter().any(|arg| matches!(arg.as_str(), "create" | "run" | "exec"))
        && let Err(error) = orlop_oci::exe::protect()
    {
        eprintln!("{}", error.report());
        return ExitCode::FAILURE;
    }
    ExitCode::from(orlop_oci::cli::run(&args))
}
