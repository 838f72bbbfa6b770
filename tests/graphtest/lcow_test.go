// Package lcow runs moby's own tests of graphdrivers against the plugin, with moby's own plugin client.
//
//	scripts/graphtest ─► this program ─► graphtest ─► graphdriver's proxy ─► plugins client ─► /run/docker/plugins/lcow.sock
//
// The tests are those of moby's daemon/graphdriver/graphtest, all of them, in the order in which moby's own drivers run
// them. Built by scripts/graphtest with the distribution's sources.
package lcow

import (
	"path/filepath"
	"testing"

	"github.com/docker/docker/daemon/graphdriver"
	"github.com/docker/docker/daemon/graphdriver/graphtest"
	"github.com/docker/docker/pkg/idtools"
	"github.com/docker/docker/pkg/plugingetter"
	"github.com/docker/docker/pkg/plugins"
)

const (
	// pluginName is the name of the socket in the folder in which moby looks for plugins.
	pluginName = "lcow"
	// driverName is what graphtest knows the driver by. It gives no plugin getter on, so that the driver that it asks for
	// has to be a registered one.
	driverName = "lcow-by-plugin"
)

// getter finds plugins as dockerd does that were not installed with `docker plugin`.
type getter struct{}

func (getter) Get(name, capability string, mode int) (plugingetter.CompatPlugin, error) {
	return plugins.Get(name, capability)
}

func (getter) GetAllByCap(string) ([]plugingetter.CompatPlugin, error) { return nil, nil }

func (getter) GetAllManagedPluginsByCap(string) []plugingetter.CompatPlugin { return nil }

func (getter) Handle(string, func(string, *plugins.Client)) {}

func open(root string, options []string, uidMaps, gidMaps []idtools.IDMap) (graphdriver.Driver, error) {
	return graphdriver.GetDriver(pluginName, getter{}, graphdriver.Options{
		Root:                filepath.Dir(root),
		DriverOptions:       options,
		UIDMaps:             uidMaps,
		GIDMaps:             gidMaps,
		ExperimentalEnabled: true,
	})
}

func init() {
	if err := graphdriver.Register(driverName, open); err != nil {
		panic(err)
	}
}

// One driver for all tests: new tests stand between TestSetup and TestTeardown.
func TestSetup(t *testing.T) {
	graphtest.GetDriver(t, driverName)
}

func TestCreateEmpty(t *testing.T) {
	graphtest.DriverTestCreateEmpty(t, driverName)
}

func TestCreateBase(t *testing.T) {
	graphtest.DriverTestCreateBase(t, driverName)
}

func TestCreateSnap(t *testing.T) {
	graphtest.DriverTestCreateSnap(t, driverName)
}

func Test128LayerRead(t *testing.T) {
	graphtest.DriverTestDeepLayerRead(t, 128, driverName)
}

func TestDiffApply10Files(t *testing.T) {
	graphtest.DriverTestDiffApply(t, 10, driverName)
}

func TestDiffApply1000Files(t *testing.T) {
	graphtest.DriverTestDiffApply(t, 1000, driverName)
}

func TestChanges(t *testing.T) {
	graphtest.DriverTestChanges(t, driverName)
}

// The last: it leaves its layers behind.
func TestSetQuota(t *testing.T) {
	graphtest.DriverTestSetQuota(t, driverName, true)
}

func TestTeardown(t *testing.T) {
	graphtest.PutDriver(t)
}
