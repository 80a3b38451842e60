//! The orlop program: reads the command line and starts what it names.

// A program has no callers outside; `pub` says what a module offers to the others.
#![allow(unreachable_pub)]

mod alone;
mod check;
mod cli;
mod commands;
mod config;
mod demo;
mod install;
mod log;
mod node;
mod up;

use alone::kubelet::flags::{self, Invocation};
use anyhow::{Context, Result};
use clap::Parser;
use cli::{Cli, Command, NodeArgs, PlaceArgs};
use commands::{NodeSocket, containers, exec, images, logs};
use config::NodeConfig;
use log::LogFormat;
use std::process::ExitCode;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

fn main() -> ExitCode {
    let cli = Cli::parse_from(cli::arguments(std::env::args_os()));
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("orlop: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    // Its own parser has a say in how it logs.
    if let Command::Kubelet(args) = cli.command {
        return kubelet(args.flags, &cli.log, cli.log_format);
    }
    log::start(&cli.log, cli.log_format)?;
    match cli.command {
        Command::Check { config } => {
            let config = if config.exists() { NodeConfig::read(&config)? } else { NodeConfig::default() };
            check::check(&config)?;
        }
        Command::Install { places, start } => install::install(&places.into(), start)?,
        Command::Uninstall { places, purge } => install::uninstall(&places.into(), purge)?,
        Command::Demo { port } => small_runtime()?.block_on(demo::serve(port))?,
        Command::Node(args) => node_runtime()?.block_on(Box::pin(node::run(args.config()?)))?,
        Command::Up(args) => up::run(args, node_runtime()?, &small_runtime()?)?,
        Command::Cri(args) => node_runtime()?.block_on(Box::pin(alone::cri::run(args)))?,
        Command::Proxy(args) => node_runtime()?.block_on(Box::pin(alone::proxy::run(*args)))?,
        Command::Overlay(args) => node_runtime()?.block_on(Box::pin(alone::overlay::run(args)))?,
        Command::Purge { config } => node_runtime()?
            .block_on(Box::pin(async { node::purge::run(NodeConfig::read(&config)?).await }))?,
        command => return small_runtime()?.block_on(talk(command)),
    }
    Ok(ExitCode::SUCCESS)
}

fn kubelet(arguments: Vec<String>, log: &str, format: LogFormat) -> Result<ExitCode> {
    match flags::parse(arguments)? {
        Invocation::Help => print!("{}", flags::help()),
        Invocation::Version => println!("Kubernetes {}", orlop_kubelet::node::KUBELET_VERSION),
        Invocation::Run(invoked) => {
            log::start(invoked.log.as_deref().unwrap_or(log), invoked.log_format.unwrap_or(format))?;
            node_runtime()?.block_on(Box::pin(alone::kubelet::run(*invoked)))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// One thread is plenty for a command that asks the node something.
fn small_runtime() -> Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("start the asynchronous runtime")
}

/// The node's own threads: two carry everything, and blocking work gets few more, each of which costs memory.
fn node_runtime() -> Result<Runtime> {
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider is installed already"))?;
    Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .thread_keep_alive(Duration::from_secs(5))
        .enable_all()
        .build()
        .context("start the asynchronous runtime")
}

/// The commands that talk to the node's socket.
async fn talk(command: Command) -> Result<ExitCode> {
    match command {
        Command::Ps { all, node } => containers::ps(NodeSocket::connect(&node.endpoint).await?, all).await?,
        Command::Pods { all, node } => {
            containers::pods(NodeSocket::connect(&node.endpoint).await?, all).await?
        }
        Command::Images { node } => images::list(NodeSocket::connect(&node.endpoint).await?).await?,
        Command::Pull { image, node } => {
            images::pull(NodeSocket::connect(&node.endpoint).await?, &image).await?
        }
        Command::Logs { which, follow, tail, timestamps, node } => {
            let mut node = NodeSocket::connect(&node.endpoint).await?;
            let container = node
                .find_container(&which.name, which.container.as_deref(), which.namespace.as_deref())
                .await?;
            logs::logs(node, container, logs::Options { follow, timestamps, tail }).await?;
        }
        Command::Exec { which, stdin, tty, command, node } => {
            let mut node = NodeSocket::connect(&node.endpoint).await?;
            let container = node
                .find_container(&which.name, which.container.as_deref(), which.namespace.as_deref())
                .await?;
            return exec::exec(node, container, command, exec::Options { stdin, tty }).await;
        }
        _ => unreachable!("every other command is handled before"),
    }
    Ok(ExitCode::SUCCESS)
}

impl From<PlaceArgs> for install::Places {
    fn from(args: PlaceArgs) -> Self {
        Self { root: args.root, bin: args.bin_dir, etc: args.config_dir, units: args.unit_dir }
    }
}

impl NodeArgs {
    /// The file, with the command line laid over it.
    fn config(self) -> Result<NodeConfig> {
        let mut config = NodeConfig::read(&self.config)?;
        config.kubeconfig = self.kubeconfig.or(config.kubeconfig);
        config.bootstrap_kubeconfig = self.bootstrap_kubeconfig.or(config.bootstrap_kubeconfig);
        config.node_name = self.hostname_override.unwrap_or(config.node_name);
        config.node_ip = self.node_ip.or(config.node_ip);
        Ok(config)
    }
}
