//! Documents, held to the letter: every key that must be there, and no other.

use super::{Fault, Faults, INVALID_JSON};
use serde_json::{Value, json};
use std::time::Duration;

/// GUIDs of the controllers that Hyper-V gives a utility VM.
const CONTROLLERS: [&str; 4] = [
    "df6d0690-79e5-55b6-a5ec-c1e2f77f580a",
    "0110f83b-de10-5172-a266-78bca56bf50a",
    "b5d2d8d4-3a75-51bf-945b-3444dc6b8579",
    "305891a9-b251-5dfe-91a2-c25d9212275b",
];

pub(crate) struct Created {
    pub(crate) console: String,
    pub(crate) faults: Faults,
}

pub(crate) struct Settings {
    pub(crate) path: String,
    pub(crate) read_only: bool,
}

pub(crate) struct Request {
    pub(crate) serial: String,
    pub(crate) settings: Option<Settings>,
}

fn wrong(what: impl std::fmt::Display) -> Fault {
    Fault(INVALID_JSON, format!("the document is wrong: {what}"))
}

fn parse(document: &str) -> Result<Value, Fault> {
    serde_json::from_str(document).map_err(wrong)
}

fn text<'a>(value: &'a Value, pointer: &str) -> Result<&'a str, Fault> {
    value.pointer(pointer).and_then(Value::as_str).ok_or_else(|| wrong(pointer))
}

/// A create document: what may differ is taken out of it, and the rest must be what the schema's example says.
pub(crate) fn create(document: &str) -> Result<Created, Fault> {
    let value = parse(document)?;
    let direct = "/VirtualMachine/Chipset/LinuxKernelDirect";
    let kernel = text(&value, &format!("{direct}/KernelFilePath"))?;
    let initrd = text(&value, &format!("{direct}/InitRdPath"))?;
    let line = text(&value, &format!("{direct}/KernelCmdLine"))?;
    let memory = value.pointer("/VirtualMachine/ComputeTopology/Memory/SizeInMB").and_then(Value::as_u64);
    let processors = value.pointer("/VirtualMachine/ComputeTopology/Processor/Count").and_then(Value::as_u64);
    let (Some(memory), Some(processors @ 1..=64)) = (memory, processors) else {
        return Err(wrong("memory or processors"));
    };
    if memory < 64 || memory % 2 != 0 {
        return Err(wrong("SizeInMB must be even and at least 64"));
    }
    let console = text(&value, "/VirtualMachine/Devices/ComPorts/0/NamedPipe")?;
    let controllers: serde_json::Map<String, Value> =
        CONTROLLERS.iter().map(|guid| ((*guid).to_owned(), json!({"Attachments": {}}))).collect();
    let expected = json!({
        "Owner": "lcow-graphdriver",
        "SchemaVersion": {"Major": 2, "Minor": 1},
        "ShouldTerminateOnLastHandleClosed": true,
        "VirtualMachine": {
            "StopOnReset": true,
            "Chipset": {"LinuxKernelDirect": {"KernelFilePath": kernel, "InitRdPath": initrd, "KernelCmdLine": line}},
            "ComputeTopology": {
                "Memory": {"SizeInMB": memory, "AllowOvercommit": true},
                "Processor": {"Count": processors},
            },
            "Devices": {
                "Scsi": controllers,
                "HvSocket": {"HvSocketConfig": {
                    "DefaultBindSecurityDescriptor": "D:P(A;;FA;;;SY)(A;;FA;;;BA)",
                    "ServiceTable": {},
                }},
                "ComPorts": {"0": {"NamedPipe": console}},
            },
        },
    });
    if value != expected {
        return Err(wrong(format!("{value} is not {expected}")));
    }
    for path in [kernel, initrd] {
        if !std::path::Path::new(path).is_file() {
            return Err(Fault(0x8007_0002, format!("there is no {path}")));
        }
    }
    if !console.starts_with(r"\\.\pipe\") {
        return Err(wrong("NamedPipe"));
    }
    let fault = |name: &str| -> Option<u64> {
        line.split(' ').find_map(|word| {
            word.strip_prefix("double.")?.strip_prefix(name)?.strip_prefix('=')?.parse().ok()
        })
    };
    Ok(Created {
        console: console.to_owned(),
        faults: Faults {
            fail_add: fault("fail-add").map(|n| n as u32),
            lose_at: fault("lose-at").map(|n| n as u32),
            pending: fault("pending").map(Duration::from_millis),
            late_exit: fault("late-exit").map(Duration::from_millis),
            mute: fault("mute").is_some(),
            attributes: fault("attributes").map_or(0, |n| n as u32),
        },
    })
}

/// A hot-add or remove.
pub(crate) fn modify(document: &str) -> Result<Request, Fault> {
    let value = parse(document)?;
    let resource = text(&value, "/ResourcePath")?;
    let place = resource
        .strip_prefix("VirtualMachine/Devices/Scsi/")
        .and_then(|rest| rest.split_once("/Attachments/"))
        .filter(|(guid, unit)| {
            CONTROLLERS.contains(guid) && unit.parse::<u32>().is_ok_and(|n| n < 64 && n.to_string() == *unit)
        });
    let (guid, unit) = place.ok_or_else(|| wrong(format!("ResourcePath {resource}")))?;
    let serial = format!("{guid}:{unit}");
    let settings = match text(&value, "/RequestType")? {
        "Remove" if value == json!({"ResourcePath": resource, "RequestType": "Remove"}) => None,
        "Add" => {
            let path = text(&value, "/Settings/Path")?;
            let read_only = value["Settings"]["ReadOnly"].as_bool().ok_or_else(|| wrong("ReadOnly"))?;
            let settings = json!({"Type": "VirtualDisk", "Path": path, "ReadOnly": read_only});
            if value != json!({"ResourcePath": resource, "RequestType": "Add", "Settings": settings}) {
                return Err(wrong(value));
            }
            Some(Settings { path: path.to_owned(), read_only })
        }
        _ => return Err(wrong(value)),
    };
    Ok(Request { serial, settings })
}
