//! What a container runs: command, environment, working directory.

use super::SpecError;
use oci_spec::image::ImageConfiguration;
use orlop_proto::cri::{ContainerConfig, KeyValue};

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A command replaces the image's entry point and its arguments; arguments alone replace only those.
pub(crate) fn arguments(
    config: &ContainerConfig,
    image: &ImageConfiguration,
) -> Result<Vec<String>, SpecError> {
    let image = image.config().as_ref();
    let of_image = |list: Option<&Vec<String>>| list.cloned().unwrap_or_default();
    let entrypoint = of_image(image.and_then(|c| c.entrypoint().as_ref()));
    let cmd = of_image(image.and_then(|c| c.cmd().as_ref()));
    let (first, rest) = match (config.command.is_empty(), config.args.is_empty()) {
        (true, true) => (entrypoint, cmd),
        (true, false) => (entrypoint, config.args.clone()),
        (false, _) => (config.command.clone(), config.args.clone()),
    };
    let arguments = [first, rest].concat();
    match arguments.first() {
        Some(program) if !program.is_empty() => Ok(arguments),
        _ => Err(SpecError::NoCommand),
    }
}

fn set(environment: &mut Vec<String>, entry: String) {
    let name = entry.split('=').next().unwrap_or_default().to_owned();
    let same = |e: &&mut String| e.split('=').next() == Some(name.as_str());
    match environment.iter_mut().find(same) {
        Some(existing) => *existing = entry,
        None => environment.push(entry),
    }
}

/// Later entries win: our defaults, the image's, the pod's.
pub(crate) fn environment(
    config: &ContainerConfig,
    image: &ImageConfiguration,
    hostname: &str,
) -> Result<Vec<String>, SpecError> {
    let mut environment = vec![DEFAULT_PATH.to_owned()];
    if config.tty {
        environment.push("TERM=xterm".to_owned());
    }
    if !hostname.is_empty() {
        environment.push(format!("HOSTNAME={hostname}"));
    }
    let of_image = image.config().as_ref().and_then(|c| c.env().clone()).unwrap_or_default();
    for entry in of_image {
        set(&mut environment, entry);
    }
    for KeyValue { key, value } in &config.envs {
        let value = std::str::from_utf8(value).map_err(|_| SpecError::Invalid {
            field: "environment",
            reason: format!("the value of {key} is not UTF-8"),
        })?;
        if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
            return Err(SpecError::Invalid {
                field: "environment",
                reason: format!("{key:?} is no variable a process could be given"),
            });
        }
        set(&mut environment, format!("{key}={value}"));
    }
    Ok(environment)
}

pub(crate) fn working_dir(config: &ContainerConfig, image: &ImageConfiguration) -> String {
    let of_image = image.config().as_ref().and_then(|c| c.working_dir().clone()).unwrap_or_default();
    [config.working_dir.clone(), of_image].into_iter().find(|d| !d.is_empty()).unwrap_or_else(|| "/".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::image::ConfigBuilder;

    fn image() -> ImageConfiguration {
        let config = ConfigBuilder::default()
            .entrypoint(vec!["/entry".to_owned()])
            .cmd(vec!["serve".to_owned()])
            .env(vec!["PATH=/image".to_owned(), "MODE=image".to_owned()])
            .working_dir("/srv")
            .build()
            .unwrap();
        let mut image = ImageConfiguration::default();
        image.set_config(Some(config));
        image
    }

    fn run(command: &[&str], args: &[&str]) -> Vec<String> {
        let own = |list: &[&str]| list.iter().map(ToString::to_string).collect();
        let config = ContainerConfig { command: own(command), args: own(args), ..Default::default() };
        arguments(&config, &image()).unwrap()
    }

    #[test]
    fn a_command_drops_the_images_arguments_too() {
        assert_eq!(run(&[], &[]), ["/entry", "serve"]);
        assert_eq!(run(&[], &["x"]), ["/entry", "x"]);
        assert_eq!(run(&["sh"], &[]), ["sh"]);
        assert_eq!(run(&["sh"], &["-c"]), ["sh", "-c"]);
        let nothing = arguments(&ContainerConfig::default(), &ImageConfiguration::default());
        assert!(matches!(nothing, Err(SpecError::NoCommand)));
    }

    #[test]
    fn the_pods_environment_wins_over_the_images() {
        let config = ContainerConfig {
            envs: vec![KeyValue { key: "MODE".into(), value: b"pod=1".to_vec() }],
            tty: true,
            ..Default::default()
        };
        let environment = environment(&config, &image(), "web-0").unwrap();
        assert_eq!(environment, ["PATH=/image", "TERM=xterm", "HOSTNAME=web-0", "MODE=pod=1"]);
        assert_eq!(working_dir(&config, &image()), "/srv");
    }
}
