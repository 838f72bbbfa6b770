<#
.SYNOPSIS
Installs lcow-graphdriver as a Windows service that Docker finds by itself.

.DESCRIPTION
Copies the program to -Destination, installs the service "lcow-graphdriver" and starts it. The service answers on the
named pipe and, while it runs, keeps the discovery file %ProgramData%\docker\plugins\lcow.spec. Run it as an
administrator. A second run brings a newer program in: the service is stopped, the file replaced, the service started.

With -Uninstall the service and the program are removed; layers, logs and configuration stay.

.PARAMETER Source
The program to install. Default: lcow-graphdriver.exe beside this script.

.PARAMETER Destination
Folder for the program.

.PARAMETER Root
Folder of the service's own state, its log (lcow.log) and, until Docker names another, the layers.

.PARAMETER Pipe
The named pipe that the service answers on.

.PARAMETER Config
A TOML file with options; see docs/options.md.

.PARAMETER StorageOpt
Options as NAME=VALUE, for example lcow.sandboxsize=30; can be several.

.PARAMETER Uninstall
Stops and removes the service and the program.

.EXAMPLE
.\install.ps1 -WhatIf
Says what would be done and does nothing.

.EXAMPLE
.\install.ps1 -StorageOpt lcow.sandboxsize=30

.EXAMPLE
.\install.ps1 -Uninstall

.LINK
docs/windows.md
#>
[CmdletBinding(SupportsShouldProcess = $true, ConfirmImpact = 'Medium')]
param(
    [string]$Source = (Join-Path $PSScriptRoot 'lcow-graphdriver.exe'),
    [string]$Destination = (Join-Path $env:ProgramFiles 'lcow-graphdriver'),
    [string]$Root = (Join-Path $env:ProgramData 'lcow'),
    [string]$Pipe = '\\.\pipe\lcow',
    [string]$Config,
    [string[]]$StorageOpt = @(),
    [switch]$Uninstall
)

Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'
$Name = 'lcow-graphdriver'
$Program = Join-Path $Destination 'lcow-graphdriver.exe'

function Invoke-Program([string[]]$Arguments) {
    & $Program @Arguments
    if ($LASTEXITCODE -ne 0) { throw "$Program $($Arguments -join ' ') failed with status $LASTEXITCODE" }
}

$identity = [Security.Principal.WindowsPrincipal][Security.Principal.WindowsIdentity]::GetCurrent()
if (-not $WhatIfPreference -and -not $identity.IsInRole([Security.Principal.WindowsBuiltInRole]::Administrator)) {
    throw 'Run this as an administrator: it installs a service.'
}
$service = Get-Service -Name $Name -ErrorAction SilentlyContinue

if ($Uninstall) {
    if ($service -and $PSCmdlet.ShouldProcess($Name, 'Stop and uninstall the service')) {
        Invoke-Program @('service', 'uninstall')
    }
    if ((Test-Path -LiteralPath $Program) -and $PSCmdlet.ShouldProcess($Program, 'Remove the program')) {
        Remove-Item -LiteralPath $Program
    }
    return
}

if (-not (Test-Path -LiteralPath $Source)) { throw "There is no program at $Source; name it with -Source." }
if ($service -and $PSCmdlet.ShouldProcess($Name, 'Stop and uninstall the present service')) {
    Invoke-Program @('service', 'uninstall')
}
if ($PSCmdlet.ShouldProcess($Program, "Copy $Source")) {
    New-Item -ItemType Directory -Force -Path $Destination | Out-Null
    Copy-Item -LiteralPath $Source -Destination $Program -Force
}
$arguments = @('service', 'install', '--root', $Root, '--pipe', $Pipe)
if ($Config) { $arguments += @('--config', (Resolve-Path -LiteralPath $Config).Path) }
foreach ($option in $StorageOpt) { $arguments += @('--storage-opt', $option) }
if ($PSCmdlet.ShouldProcess($Name, "Install the service: $($arguments -join ' ')")) {
    Invoke-Program $arguments
}
if ($PSCmdlet.ShouldProcess($Name, 'Start the service')) {
    Invoke-Program @('service', 'start')
}
