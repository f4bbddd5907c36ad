"""The wheel carries conf/ and assets/ as triptych/_conf and triptych/_assets.

`hydra_plugins` is the namespace in which Hydra looks for launchers; it has no __init__.py.
"""

from setuptools import find_packages, setup

packages = find_packages("src")
setup(
    packages=[*packages, "hydra_plugins", "triptych._conf", "triptych._assets"],
    package_dir={"": "src", "triptych._conf": "conf", "triptych._assets": "assets"},
    package_data={
        "triptych": ["**/*.txt", "**/*.json"],
        "triptych._conf": ["**/*.yaml"],
        "triptych._assets": ["**/*"],
    },
    exclude_package_data={"triptych._conf": ["local/*"]},
)
