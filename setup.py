"""The wheel carries conf/ and assets/ as triptych/_conf and triptych/_assets."""

from setuptools import find_packages, setup

packages = find_packages("src")
setup(
    packages=[*packages, "triptych._conf", "triptych._assets"],
    package_dir={"": "src", "triptych._conf": "conf", "triptych._assets": "assets"},
    package_data={
        "triptych": ["**/*.txt", "**/*.json"],
        "triptych._conf": ["**/*.yaml"],
        "triptych._assets": ["**/*"],
    },
    exclude_package_data={"triptych._conf": ["local/*"]},
)
