//! The Host Compute Service's JSON documents, schema 2.1: only the fields that a service VM needs.
//!
//! ```text
//!   ComputeSystem ─► HcsCreateComputeSystem      ModifySettingRequest ─► HcsModifyComputeSystem (SCSI hot-add, remove)
//!   Properties    ◄─ HcsGetComputeSystemProperties
//! ```
//!
//! Names and order are those of Microsoft's schema ("HCS schema reference", 2.1). Golden tests below hold the text.

use super::luns::Slot;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::Path};

/// Owner of the machines, as in `hcsdiag list`; a start finds those of a predecessor by it.
pub const OWNER: &str = "lcow-graphdriver";
/// Only the system and administrators may bind hvsock services of a machine.
const BIND_DESCRIPTOR: &str = "D:P(A;;FA;;;SY)(A;;FA;;;BA)";

/// A machine to be created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct ComputeSystem {
    owner: String,
    schema_version: SchemaVersion,
    /// The machine ends with the last handle of it: nothing outlives a killed daemon.
    should_terminate_on_last_handle_closed: bool,
    virtual_machine: VirtualMachine,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct SchemaVersion {
    major: u32,
    minor: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct VirtualMachine {
    stop_on_reset: bool,
    chipset: Chipset,
    compute_topology: Topology,
    devices: Devices,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Chipset {
    linux_kernel_direct: LinuxKernelDirect,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct LinuxKernelDirect {
    kernel_file_path: String,
    init_rd_path: String,
    kernel_cmd_line: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Topology {
    memory: Memory,
    processor: Processor,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Memory {
    #[serde(rename = "SizeInMB")]
    size_in_mb: u64,
    allow_overcommit: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Processor {
    count: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Devices {
    scsi: BTreeMap<String, Controller>,
    hv_socket: HvSocket,
    com_ports: BTreeMap<String, ComPort>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Controller {
    attachments: BTreeMap<String, Attachment>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct HvSocket {
    hv_socket_config: HvSocketConfig,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct HvSocketConfig {
    default_bind_security_descriptor: String,
    service_table: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct ComPort {
    named_pipe: String,
}

/// A disk on a controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Attachment {
    r#type: String,
    path: String,
    read_only: bool,
}

/// What a machine is made of.
#[derive(Debug, Clone, Copy)]
pub struct MachineSpec<'a> {
    /// The Linux kernel, uncompressed or bzImage.
    pub kernel: &'a Path,
    /// The initial RAM disk, whose `/init` is the agent.
    pub initrd: &'a Path,
    /// Kernel command line.
    pub command_line: &'a str,
    /// Memory, MiB.
    pub memory_mb: u64,
    /// Processors.
    pub processors: u32,
    /// Pipe that shows the serial console.
    pub console_pipe: &'a str,
}

impl ComputeSystem {
    /// The document of a service VM: four empty SCSI controllers, hvsock, a serial console.
    pub fn service_vm(machine: &MachineSpec<'_>) -> Self {
        let empty = || Controller { attachments: BTreeMap::new() };
        Self {
            owner: OWNER.into(),
            schema_version: SchemaVersion { major: 2, minor: 1 },
            should_terminate_on_last_handle_closed: true,
            virtual_machine: VirtualMachine {
                stop_on_reset: true,
                chipset: Chipset {
                    linux_kernel_direct: LinuxKernelDirect {
                        kernel_file_path: machine.kernel.to_string_lossy().into_owned(),
                        init_rd_path: machine.initrd.to_string_lossy().into_owned(),
                        kernel_cmd_line: machine.command_line.into(),
                    },
                },
                compute_topology: Topology {
                    memory: Memory { size_in_mb: machine.memory_mb, allow_overcommit: true },
                    processor: Processor { count: machine.processors },
                },
                devices: Devices {
                    scsi: Slot::controllers().map(|guid| (guid.to_owned(), empty())).collect(),
                    hv_socket: HvSocket {
                        hv_socket_config: HvSocketConfig {
                            default_bind_security_descriptor: BIND_DESCRIPTOR.into(),
                            service_table: BTreeMap::new(),
                        },
                    },
                    com_ports: [("0".to_owned(), ComPort { named_pipe: machine.console_pipe.into() })].into(),
                },
            },
        }
    }
}

/// A change of a running machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct ModifySettingRequest {
    resource_path: String,
    request_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    settings: Option<Attachment>,
}

impl ModifySettingRequest {
    /// Hot-adds a VHD or VHDX.
    pub fn add_disk(slot: Slot, path: &Path, read_only: bool) -> Self {
        let attachment =
            Attachment { r#type: "VirtualDisk".into(), path: path.to_string_lossy().into_owned(), read_only };
        Self { resource_path: slot.resource_path(), request_type: "Add", settings: Some(attachment) }
    }

    /// Takes a disk away.
    pub fn remove_disk(slot: Slot) -> Self {
        Self { resource_path: slot.resource_path(), request_type: "Remove", settings: None }
    }
}

/// Properties of a machine, in replies and lists of the service.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Properties {
    /// Its name, as it was created.
    #[serde(default)]
    pub id: String,
    /// Who made it.
    #[serde(default)]
    pub owner: String,
    /// Its identity for hvsock.
    pub runtime_id: Option<uuid::Uuid>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(value: &impl Serialize) -> String {
        serde_json::to_string(value).unwrap()
    }

    #[test]
    fn the_create_document_is_what_the_service_expects() {
        let machine = MachineSpec {
            kernel: Path::new(r"C:\lcow\kernel"),
            initrd: Path::new(r"C:\lcow\initrd.img"),
            command_line: "panic=-1 console=ttyS0",
            memory_mb: 1024,
            processors: 2,
            console_pipe: r"\\.\pipe\lcow-console-1",
        };
        let expected = concat!(
            r#"{"Owner":"lcow-graphdriver","SchemaVersion":{"Major":2,"Minor":1},"ShouldTerminateOnLastHandleClosed":true,"#,
            r#""VirtualMachine":{"StopOnReset":true,"Chipset":{"LinuxKernelDirect":{"KernelFilePath":"C:\\lcow\\kernel","#,
            r#""InitRdPath":"C:\\lcow\\initrd.img","KernelCmdLine":"panic=-1 console=ttyS0"}},"#,
            r#""ComputeTopology":{"Memory":{"SizeInMB":1024,"AllowOvercommit":true},"Processor":{"Count":2}},"#,
            r#""Devices":{"Scsi":{"0110f83b-de10-5172-a266-78bca56bf50a":{"Attachments":{}},"#,
            r#""305891a9-b251-5dfe-91a2-c25d9212275b":{"Attachments":{}},"#,
            r#""b5d2d8d4-3a75-51bf-945b-3444dc6b8579":{"Attachments":{}},"#,
            r#""df6d0690-79e5-55b6-a5ec-c1e2f77f580a":{"Attachments":{}}},"#,
            r#""HvSocket":{"HvSocketConfig":{"DefaultBindSecurityDescriptor":"D:P(A;;FA;;;SY)(A;;FA;;;BA)","ServiceTable":{}}},"#,
            r#""ComPorts":{"0":{"NamedPipe":"\\\\.\\pipe\\lcow-console-1"}}}}}"#,
        );
        assert_eq!(json(&ComputeSystem::service_vm(&machine)), expected);
    }

    #[test]
    fn hot_add_and_remove_name_controller_and_lun() {
        let slot = Slot::new(65).unwrap();
        assert_eq!(
            json(&ModifySettingRequest::add_disk(slot, Path::new(r"C:\l\layer.vhd"), true)),
            concat!(
                r#"{"ResourcePath":"VirtualMachine/Devices/Scsi/0110f83b-de10-5172-a266-78bca56bf50a/Attachments/1","#,
                r#""RequestType":"Add","Settings":{"Type":"VirtualDisk","Path":"C:\\l\\layer.vhd","ReadOnly":true}}"#
            )
        );
        assert_eq!(
            json(&ModifySettingRequest::remove_disk(slot)),
            concat!(
                r#"{"ResourcePath":"VirtualMachine/Devices/Scsi/0110f83b-de10-5172-a266-78bca56bf50a/Attachments/1","#,
                r#""RequestType":"Remove"}"#
            )
        );
    }

    #[test]
    fn properties_are_read_whatever_else_is_there() {
        let text = r#"{"Id":"x","SystemType":"VirtualMachine","Owner":"o","RuntimeId":"8a4a5f9c-8d1a-4e76-8f6e-0c0a3d8b2f11","State":"Running"}"#;
        let properties: Properties = serde_json::from_str(text).unwrap();
        assert_eq!((properties.id.as_str(), properties.owner.as_str()), ("x", "o"));
        assert!(properties.runtime_id.is_some());
    }
}
