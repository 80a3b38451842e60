//! `orlop-cni`: the pod network behind CNI's command line. Also answers as `flannel`.

use orlop_cni::plugin::{self, Code, Environment, PluginError};
use std::io::{Read, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    let environment = Environment::of_process();
    let mut stdin = Vec::new();
    // A person at a terminal gets the message about the missing command, not a program that waits.
    if !environment.command.is_empty()
        && let Err(error) = std::io::stdin().read_to_end(&mut stdin)
    {
        return fail(&PluginError::new(Code::Io, "cannot read standard input").details(error), &[]);
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return fail(
                &PluginError::new(Code::Internal, "cannot start the event loop").details(error),
                &stdin,
            );
        }
    };
    match runtime.block_on(plugin::run(&environment, &stdin)) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(output)) => match writeln!(std::io::stdout(), "{output}") {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(error) => fail(&error, &stdin),
    }
}

fn fail(error: &PluginError, stdin: &[u8]) -> ExitCode {
    // Whoever closed our standard output does not want to know.
    let _ = writeln!(std::io::stdout(), "{}", error.to_json(&plugin::version_of(stdin)));
    ExitCode::FAILURE
}
