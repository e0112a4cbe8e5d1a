//! What a device offers its driver that not every device does, as the command line and the configuration file write it: the
//! doors to its gate, and packed rings.
//!
//! Nothing of it by default: of the doors, virtio 1.4 has one and reserves the feature bits of the others, and packed rings
//! are taken by every driver that knows them.

use std::fmt;

use devices::virtio::{Doors, Offer, Suspend};

/// How it is written.
pub(super) const FORM: &str = "[,suspend=v5|v1.4][,device-stop[=BIT]][,device-state-cap][,packed]";

/// Takes `key` if it is about this; false if it is not.
pub(super) fn take(offer: &mut Offer, key: &str, value: Option<&str>) -> Result<bool, String> {
    let doors = &mut offer.doors;
    match (key, value) {
        ("suspend", Some(value)) => doors.suspend = Some(suspend(value)?),
        ("device-stop", None) => doors.device_stop = Some(Doors::DEVICE_STOP),
        ("device-stop", Some(value)) => {
            let bit = value.parse().map_err(|_| device_stop_rule(value))?;
            doors.device_stop = Some(device_stop(bit)?);
        }
        ("device-state-cap", None) => doors.queue_status = true,
        ("packed", None) => offer.packed = true,
        _ => return Ok(false),
    }
    Ok(true)
}

/// The keys of a configuration file.
#[derive(Clone, Debug, Default)]
pub(super) struct Given {
    pub suspend: Option<String>,
    pub device_stop: Option<u32>,
    pub device_state_cap: bool,
    pub packed: bool,
}

impl TryFrom<Given> for Offer {
    type Error = String;

    fn try_from(given: Given) -> Result<Self, String> {
        Ok(Self {
            doors: Doors {
                suspend: given.suspend.as_deref().map(suspend).transpose()?,
                device_stop: given.device_stop.map(device_stop).transpose()?,
                queue_status: given.device_state_cap,
            },
            packed: given.packed,
        })
    }
}

impl From<Offer> for Given {
    fn from(Offer { doors, packed }: Offer) -> Self {
        Self {
            suspend: doors.suspend.map(|suspend| suspend.name().to_owned()),
            device_stop: doors.device_stop.map(u32::from),
            device_state_cap: doors.queue_status,
            packed,
        }
    }
}

fn suspend(name: &str) -> Result<Suspend, String> {
    let found = Suspend::from_name(name);
    found.ok_or_else(|| {
        format!(
            "suspend={name} is unknown; write suspend=v5 (feature {}) or suspend=v1.4 (feature {})",
            Suspend::V5.feature(),
            Suspend::V1_4.feature()
        )
    })
}

fn device_stop(bit: u32) -> Result<u8, String> {
    let small = u8::try_from(bit).ok();
    small
        .filter(|bit| Doors::DEVICE_STOP_RANGE.contains(bit))
        .ok_or_else(|| device_stop_rule(&bit.to_string()))
}

/// Why `device-stop=given` was refused.
fn device_stop_rule(given: &str) -> String {
    let (first, last) = (
        Doors::DEVICE_STOP_RANGE.start(),
        Doors::DEVICE_STOP_RANGE.end(),
    );
    let taken = match given {
        "42" => "; 42 is the feature of suspend=v5",
        "43" => "; 43 is the feature of suspend=v1.4",
        _ => "",
    };
    format!(
        "device-stop={given} is not possible{taken}; virtio 1.4 leaves the feature bits {first} to {last} free"
    )
}

/// The names of the doors, as they are written.
pub fn names(doors: Doors) -> Vec<String> {
    let suspend = doors.suspend.map(|s| format!("suspend={}", s.name()));
    let stop = doors.device_stop.map(|bit| format!("device-stop={bit}"));
    let state = doors.queue_status.then(|| "device-state-cap".to_owned());
    [suspend, stop, state].into_iter().flatten().collect()
}

/// Writes `offer` behind other options.
pub(super) fn write(f: &mut fmt::Formatter<'_>, offer: Offer) -> fmt::Result {
    let packed = offer.packed.then(|| "packed".to_owned());
    let mut names = names(offer.doors).into_iter().chain(packed);
    names.try_for_each(|name| write!(f, ",{name}"))
}

#[cfg(test)]
mod tests {
    use crate::config::{Disk, Net, Pf};

    #[test]
    fn offers_are_written_and_read_alike_everywhere() {
        for offer in [
            "",
            ",suspend=v5",
            ",suspend=v1.4,device-stop=44",
            ",device-stop=49,device-state-cap",
            ",suspend=v5,device-stop=45,device-state-cap",
            ",packed",
            ",device-stop=44,packed",
        ] {
            let disk: Disk = format!("path=a{offer}").parse().unwrap();
            let net: Net = format!("switch=s{offer}").parse().unwrap();
            let pf: Pf = format!("net,vfs=2{offer}").parse().unwrap();
            assert_eq!(disk.to_string(), format!("path=a{offer}"));
            assert_eq!(net.to_string(), format!("switch=s{offer}"));
            assert_eq!(pf.to_string(), format!("net,vfs=2{offer}"));
            assert_eq!((disk.offer, net.offer), (pf.offer, pf.offer));
            let json = serde_json::to_string(&disk).unwrap();
            assert_eq!(serde_json::from_str::<Disk>(&json).unwrap(), disk, "{json}");
            let json = serde_json::to_string(&net).unwrap();
            assert_eq!(serde_json::from_str::<Net>(&json).unwrap(), net, "{json}");
            let json = serde_json::to_string(&pf).unwrap();
            assert_eq!(serde_json::from_str::<Pf>(&json).unwrap(), pf, "{json}");
        }
    }

    #[test]
    fn the_file_says_the_same_as_the_command_line() {
        let json =
            r#""suspend": "v1.4", "device_stop": 46, "device_state_cap": true, "packed": true"#;
        let text = "suspend=v1.4,device-stop=46,device-state-cap,packed";
        let disk: Disk = serde_json::from_str(&format!(r#"{{"path": "a", {json}}}"#)).unwrap();
        assert_eq!(disk, format!("path=a,{text}").parse().unwrap());
        let net: Net = serde_json::from_str(&format!(r#"{{"switch": "s", {json}}}"#)).unwrap();
        assert_eq!(net, format!("switch=s,{text}").parse().unwrap());
        let pf = format!(r#"{{"type": "net", "vfs": 1, {json}}}"#);
        let pf: Pf = serde_json::from_str(&pf).unwrap();
        assert_eq!(pf, format!("net,vfs=1,{text}").parse().unwrap());
    }

    #[test]
    fn without_a_number_device_stop_has_the_first_that_is_free() {
        let disk: Disk = "path=a,device-stop".parse().unwrap();
        assert_eq!(disk.offer.doors.device_stop, Some(44));
    }

    #[test]
    fn what_cannot_be_offered_is_refused_with_the_part() {
        for (text, part) in [
            ("suspend", "'suspend' is not understood"),
            ("suspend=v4", "suspend=v4 is unknown; write suspend=v5"),
            ("suspend=v5,suspend=v1.4", "suspend is given twice"),
            ("device-stop=42", "42 is the feature of suspend=v5"),
            ("device-stop=43", "43 is the feature of suspend=v1.4"),
            ("device-stop=50", "44 to 49"),
            ("device-stop=-1", "device-stop=-1 is not possible"),
            ("device-stop=300", "device-stop=300 is not possible"),
            ("device-state-cap=1", "not understood"),
            ("packed=off", "'packed=off' is not understood"),
        ] {
            let disk = format!("path=a,{text}").parse::<Disk>().unwrap_err();
            assert!(disk.contains(part), "{text}: {disk}");
            let net = format!("switch=s,{text}").parse::<Net>().unwrap_err();
            assert!(net.contains(part), "{text}: {net}");
            let pf = format!("net,vfs=1,{text}").parse::<Pf>().unwrap_err();
            assert!(pf.contains(part), "{text}: {pf}");
        }
        for (json, part) in [
            (r#""suspend": "v6""#, "suspend=v6"),
            (r#""device_stop": 43"#, "suspend=v1.4"),
            (r#""device_stop": true"#, "boolean"),
        ] {
            let disk = serde_json::from_str::<Disk>(&format!(r#"{{"path": "a", {json}}}"#));
            let message = disk.unwrap_err().to_string();
            assert!(message.contains(part), "{json}: {message}");
        }
    }
}
