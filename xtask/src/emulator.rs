//! The emulator of the KVM machine, in a version that emulates several CPUs right.

use std::fs;

use anyhow::{Result, bail};

use crate::{apt, packages, tools, workspace};

/// The first version that translates guest code under the lock of its page. Before it, a CPU can go on running code that
/// another one has just patched, as Linux does to itself all the time: guests, or the whole machine, die of a stale
/// breakpoint now and then.
const SOUND: Version = Version(8, 1);

/// Major and minor number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

impl Version {
    /// Reads the first `MAJOR.MINOR` of a program's or a package's version.
    fn parse(text: &str) -> Option<Self> {
        // What follows in parentheses is the package's version; and that may begin with an epoch.
        let text = text.split_once('(').map_or(text, |(version, _)| version);
        let text = text.rsplit_once(':').map_or(text, |(_, version)| version);
        let start = text.find(|c: char| c.is_ascii_digit())?;
        let mut numbers = text
            .get(start..)?
            .split(|c: char| !c.is_ascii_digit())
            .map(str::parse);
        Some(Self(numbers.next()?.ok()?, numbers.next()?.ok()?))
    }

    fn installed() -> Option<Self> {
        let name = packages::QEMU.name;
        let said = tools::installed(name)
            .then(|| tools::output(name, &["--version"]).ok())
            .flatten()?;
        Self::parse(said.lines().next()?)
    }
}

/// Installs QEMU, from the distribution's backports if its own is too old, or says what to run.
pub fn ensure() -> Result<()> {
    if Version::installed().is_some_and(|version| version >= SOUND) {
        return Ok(());
    }
    let package = packages::QEMU.package;
    let candidate = apt::candidate(package)?;
    let sound = candidate.is_some_and(|p| Version::parse(&p.version) >= Some(SOUND));
    if !sound && let Err(error) = from_backports(package) {
        eprintln!(
            "xtask: no {package} {}.{} or later: {error:#}",
            SOUND.0, SOUND.1
        );
        eprintln!("xtask: with an older one, guests with several CPUs may crash now and then");
    }
    packages::ensure(&[packages::QEMU])
}

/// Installs `package` from the backports of this release, found where the release itself comes from. The system's list of
/// sources stays as it is.
fn from_backports(package: &str) -> Result<()> {
    let codename = codename(&fs::read_to_string("/etc/os-release")?)
        .map(str::to_owned)
        .unwrap_or_default();
    let targets = tools::output(
        "apt-get",
        &["indextargets", "--format", "$(REPO_URI) $(CODENAME)"],
    )?;
    let Some(site) = site(&targets, &codename) else {
        bail!("apt has no source for {codename:?}, so there is no telling where its backports are");
    };
    let list = workspace::cache()?.join("backports.list");
    fs::write(&list, format!("deb {site} {codename}-backports main\n"))?;
    apt::install_from(&list, &format!("{codename}-backports"), package)
}

fn codename(os_release: &str) -> Option<&str> {
    os_release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"'))
        .filter(|name| !name.is_empty())
}

/// Where the release `codename` comes from.
fn site<'a>(targets: &'a str, codename: &str) -> Option<&'a str> {
    targets
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(_, name)| *name == codename)
        .map(|(site, _)| site)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_programs_and_packages_are_read() {
        for (text, expected) in [
            (
                "QEMU emulator version 7.2.22 (Debian 1:9.9+dfsg-7)",
                Some(Version(7, 2)),
            ),
            ("QEMU emulator version 10.0.2", Some(Version(10, 0))),
            ("1:7.2+dfsg-7+deb12u18+b3", Some(Version(7, 2))),
            ("1:10.0.2+ds-2+deb13u1~bpo12+1", Some(Version(10, 0))),
            ("no digits", None),
            ("8", None),
        ] {
            assert_eq!(Version::parse(text), expected, "{text}");
        }
        assert!(Version(7, 2) < SOUND && Version(8, 1) >= SOUND && Version(10, 0) >= SOUND);
    }

    #[test]
    fn the_release_and_where_it_comes_from_are_found() {
        assert_eq!(
            codename("ID=debian\nVERSION_CODENAME=bookworm\n"),
            Some("bookworm")
        );
        assert_eq!(codename("VERSION_CODENAME=\n"), None);
        let targets =
            "http://a.example/security bookworm-security\nhttp://a.example/debian bookworm\n";
        assert_eq!(site(targets, "bookworm"), Some("http://a.example/debian"));
        assert_eq!(site(targets, "trixie"), None);
    }
}
