# Shared by up and test: what a fresh machine lacks, and the build. Sourced from the workspace's folder.

need_root() {
  [ "$(id -u)" = 0 ] || { echo "$0: namespaces and mounts need root: run it with sudo" >&2; exit 1; }
  # sudo drops the user's path; Rust and Go often live there.
  local home
  home=$(getent passwd "${SUDO_USER:-root}" | cut -d: -f6)
  export PATH="$PATH:$home/.cargo/bin:/root/.cargo/bin:/usr/local/go/bin:/usr/local/cargo/bin"
}

# Installs Debian packages that are missing; silent when all are there.
setup_packages() {
  local missing=() package
  for package in build-essential pkg-config iproute2 util-linux curl ca-certificates "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  echo "==> installing packages: ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

setup_build() {
  command -v cargo >/dev/null || { echo "$0: cargo is missing: install Rust 1.95 or newer" >&2; exit 1; }
  echo "==> building (the first time takes minutes)"
  cargo build --release --locked --workspace
}
